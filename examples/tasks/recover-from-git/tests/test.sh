#!/bin/bash
check() {
    [[ $(sha256sum < /app/notes.txt) == "d5a01f02d093fcf53f841c0de50db70a41e10b99c6d523013225fd9fe26be9f6  -" ]] && cd /app &&
        [[ $(git -c safe.directory=/app rev-list --count main) == 2 ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
