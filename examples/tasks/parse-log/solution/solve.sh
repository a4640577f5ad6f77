#!/bin/bash
cd /app || exit 1
awk '$4 ~ /:14:..:..$/ && $9 >= 500 { n[$1]++; bytes[$1] += $10 }
    END { for (client in n) print n[client], client, bytes[client] }' access.log |
    sort -rn | head -n 1 | cut -d' ' -f2- > answer.txt
