#!/bin/bash
# Texts that the agent never saw: counts of two digits, ties, file names with spaces, empty files.
check() {
    cd /tmp && for i in {1..12}; do echo "Zebra--zebra's apple_pear"; done > 'a text' && echo 'fig FIG! kiwi' >> 'a text'
    [[ $(bash /app/top.sh 'a text') == $'24 zebra\n12 apple\n12 pear' ]] || return 1
    echo 'b c a' > text; [[ $(bash /app/top.sh text) == $'1 a\n1 b\n1 c' ]] || return 1
    : > text; [[ $(bash /app/top.sh text) == '' ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
