"""Divides work of different sizes into shares of about the same size."""

from __future__ import annotations

from collections.abc import Sequence


def even_shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """`count` lists of indices with about equal sums of sizes, ascending in each. The largest size comes
    first, and each goes to the list with the smallest sum so far. A list is empty where there are too few
    sizes.
    """
    sums, found = [0] * count, [list[int]() for _ in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        smallest = sums.index(min(sums))
        sums[smallest] += sizes[index]
        found[smallest].append(index)
    return [sorted(indices) for indices in found]
