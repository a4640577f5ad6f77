#!/bin/bash
# The answer is in this image; what an agent did anywhere but in /app/report did not come here.
report=/app/report/slowest.txt
if [[ -f $report && $(wc -l <"$report") == "$WANTED" ]] && diff "$report" /tests/slowest.txt; then
    reward=1
else
    reward=0
fi
echo $reward >/logs/verifier/reward.txt
