import json
import sys

totals = {}
skipped = 0
for line in open(sys.argv[1]):
    record = json.loads(line)
    totals[record["customer"]] += record["amount"]
for name in totals:
    print(f"{name} {totals[name]:.2f}")
print("skipped", skipped)
