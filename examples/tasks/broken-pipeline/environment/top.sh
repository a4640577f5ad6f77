#!/bin/bash
cat $1 | tr ' ' '\n' | tr A-Z a-z | uniq -c | sort -r | head -n 3
