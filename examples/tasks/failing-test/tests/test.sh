#!/bin/bash
# Random intervals, against counting one by one: special-casing the visible tests is of no use.
check() { cd /app && python3 -B /tests/check.py; }
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
