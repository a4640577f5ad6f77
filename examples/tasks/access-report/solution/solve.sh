#!/bin/bash
mkdir -p /app/report
awk '$5 < 400 {sum[$4] += $6; count[$4]++}
     END {for (path in sum) if (count[path] >= 3) print path, int(sum[path] / count[path])}' /app/access.log |
    sort -k 2,2nr | head -n 5 >/app/report/slowest.txt
