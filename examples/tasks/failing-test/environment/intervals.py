"""Closed intervals (low, high) of integers."""


def merge(intervals):
    """The same integers in as few intervals as possible, in order. Neighbours such as (1, 2), (3, 4) join."""
    merged = []
    for low, high in intervals:
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def size(intervals):
    """How many integers they hold."""
    return sum(high - low for low, high in merge(intervals))
