#!/bin/bash
# On other chapters than those the agent saw, and again after a change.
check() {
    cd /app && make clean >/dev/null; rm -rf build chapters && mkdir chapters
    echo one two three > chapters/delta.txt && echo four > chapters/zeta.txt && make || return 1
    [[ $(cat build/index.txt) == $'delta: 3 words\nzeta: 1 words\ntotal: 4 words' ]] || return 1
    sleep 1.1; echo five six > chapters/epsilon.txt && echo one > chapters/delta.txt && make || return 1
    [[ $(cat build/index.txt) == $'delta: 1 words\nepsilon: 2 words\nzeta: 1 words\ntotal: 4 words' ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
