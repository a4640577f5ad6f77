#!/bin/bash
# The answer is in this image; what an agent did anywhere but in /app/report did not come here.
report=/app/report/slowest.txt
if [[ -f $report && $(wc -l <"$report") == "$WANTED" ]] && diff "$report" /tests/slowest.txt; then
    echo 1
else
    echo 0
fi >/logs/verifier/reward.txt
