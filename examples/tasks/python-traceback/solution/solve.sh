#!/bin/bash
cat > /app/totals.py <<'END'
import json
import sys

totals = {}
skipped = 0
for line in open(sys.argv[1]):
    if not line.strip():
        continue
    try:
        record = json.loads(line)
        customer, amount = record["customer"], record["amount"]
        if not customer or type(amount) not in (int, float):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        skipped += 1
        continue
    totals[customer] = totals.get(customer, 0) + amount
for name in sorted(totals):
    print(f"{name} {totals[name]:.2f}")
print("skipped", skipped)
END
python3 /app/totals.py /app/orders.jsonl
