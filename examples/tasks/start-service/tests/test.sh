#!/bin/bash
# A file that did not exist before: only a server that runs now can send it.
fetch() { exec 5<>/dev/tcp/127.0.0.1/8080 && printf 'GET /%s HTTP/1.0\r\n\r\n' "$1" >&5 && timeout 5 cat <&5; }
check() {
    secret=$RANDOM$RANDOM$RANDOM && echo "$secret" > "/app/public/$secret.txt" &&
        [[ $(fetch "$secret.txt") == *" 200 "*"$secret" && $(fetch index.html) == *welcome ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
