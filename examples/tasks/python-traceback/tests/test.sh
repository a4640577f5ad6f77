#!/bin/bash
check() {
    cat > /tmp/orders <<'END'
{"customer": "Zoe", "amount": 1e2}
[1, 2]

7
{"customer": "Zoe", "amount": true}
{"customer": "Ann", "amount": 0.1}
{"customer": "Ann", "amount": 0.2, "note": "{"}
{"customer": null, "amount": 3}
{"customer": "Bob", "amount": null}
{"customer": "Cid", "amount": "12"}
{"customer": "Bob"
END
    [[ $(python3 /app/totals.py /tmp/orders) == $'Ann 0.30\nZoe 100.00\nskipped 7' ]] || return 1
    : > /tmp/orders && [[ $(python3 /app/totals.py /tmp/orders) == 'skipped 0' ]] || return 1
    [[ $(python3 /app/totals.py /app/orders.jsonl) == $'Adams 2.00\nWeber 12.75\nskipped 5' ]]
}
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
