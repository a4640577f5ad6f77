#!/bin/bash
check() {
    cd /app/site && [[ $(find . -printf '%m %y %p\n' | LC_ALL=C sort -k3) == "$(cat /tests/expected)" ]] &&
        [[ $(find . -type f -exec cat {} + | LC_ALL=C sort | sha256sum) == "80ef316826365e4b6b33aabc7980013a90365cf35d4d84e5c35942b8e047f822  -" ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
