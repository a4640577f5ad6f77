#!/bin/bash
cd /app || exit 1
sed -i 's/in intervals:$/in sorted(intervals):/; s/low <= merged\[-1\]\[1\]:/low <= merged[-1][1] + 1:/
s/merged\[-1\] = (merged\[-1\]\[0\], high)/merged[-1] = (merged[-1][0], max(merged[-1][1], high))/
s/sum(high - low for/sum(high - low + 1 for/' intervals.py
sed -i 's/for low, high in sorted(intervals)/for low, high in sorted(intervals)/' intervals.py
python3 -m unittest
