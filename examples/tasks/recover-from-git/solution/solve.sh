#!/bin/bash
cd /app || exit 1
last=$(git log -g --format='%H %s' HEAD | grep 'more 3$' | head -n 1 | cut -d' ' -f1)
git show "$last:notes.txt" > notes.txt
