import random
import sys

sys.path.insert(0, "/app")
from intervals import merge, size

for _ in range(300):
    lows = [random.randrange(60) for _ in range(random.randrange(9))]
    intervals = [(low, low + random.randrange(8)) for low in lows]
    random.shuffle(intervals)
    held = sorted({i for low, high in intervals for i in range(low, high + 1)})
    starts = [i for i in held if i - 1 not in held]
    ends = [i for i in held if i + 1 not in held]
    assert merge(list(intervals)) == list(zip(starts, ends)), intervals
    assert size(list(intervals)) == len(held), intervals
