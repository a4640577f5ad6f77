#!/bin/bash
cd /app || exit 1
sed -i 's/^enabled.*/enabled = yes/; s/^port.*/port = 8080/; s/^folder.*/folder = public/' server.conf
setsid python3 server.py > server.log 2>&1 &
for i in {1..50}; do (echo > /dev/tcp/127.0.0.1/8080) 2>/dev/null && exit 0; sleep 0.1; done
cat server.log
exit 1
