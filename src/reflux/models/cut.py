"""Cuts texts into parts by a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np


def cut(lengths: Sequence[int], budget: Callable[[], int], pack: bool) -> Iterator[slice]:
    """Consecutive texts whose layout has at most `budget` tokens, but at least one text. lengths: in falling
    order. budget: asked again for each part. pack: the texts are packed; otherwise padding counts too.
    """
    start, sums = 0, np.concatenate([[0], np.cumsum(lengths)])
    while start < len(lengths):
        fits = (
            int(np.searchsorted(sums, sums[start] + budget(), "right")) - 1 - start
            if pack
            else budget() // max(1, lengths[start])
        )
        stop = start + max(1, fits)
        yield slice(start, stop)
        start = stop
