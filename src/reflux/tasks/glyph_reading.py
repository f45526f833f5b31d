"""What an image of glyphs shows, read by a program: the nearest digit, the number of spots, and how clean it
is. numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reflux.tasks.glyph_drawing import NUMBERS, SHIFTS, SIDE, WHITE, Domain, ideals

# pixels in which a digit may differ from the nearest drawn one
MOST_OFF = 6
# pixels; what is smaller is a speck, and does not count
LEAST_SPOT = 4


def checked(made: Any) -> np.ndarray:
    """`made`, if it is an image that can be read: uint8 [16, 16]. ValueError for all else."""
    if not isinstance(made, np.ndarray) or made.shape != (SIDE, SIDE) or made.dtype != np.uint8:
        what = f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
        raise ValueError(
            f"glyphs judges images of uint8 [{SIDE}, {SIDE}], got {what}; use a flow model of one channel "
            f"and {SIDE} x {SIDE} pixels"
        )
    return made


def ink(image: np.ndarray) -> np.ndarray:
    """Which pixels are nearer to white than to black. bool, like `image`."""
    return 2 * image.astype(int) > WHITE


def is_right(image: np.ndarray, domain: Domain, number: int) -> bool:
    """digits: the digit is the nearest one. counts: so many spots."""
    return digit_in(image) == number if domain == "digits" else spots(image) == number


def digit_in(image: np.ndarray) -> int | None:
    """The digit whose nearest drawing, at any of its 9 places, differs in the fewest pixels of ink. None
    where that is more than MOST_OFF pixels, or where two digits are equally near."""
    off = (ink(ideals("digits")) != ink(image)).sum(axis=(1, 2))
    nearest = off.reshape(len(NUMBERS["digits"]), len(SHIFTS) ** 2).min(axis=1)
    found = np.flatnonzero(nearest == nearest.min())
    return int(found[0]) if len(found) == 1 and nearest.min() <= MOST_OFF else None


def spots(image: np.ndarray) -> int:
    """How many pieces of ink, joined by their sides, have at least LEAST_SPOT pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(ink(image))}
    found = 0
    while left:
        edge, size = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            size += 1
            beside = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= beside
            edge.extend(beside)
        found += size >= LEAST_SPOT
    return found


def quality(image: np.ndarray, domain: Domain) -> float:
    """How clean an image is, whatever was asked, in [0, 1]: the largest 1 - |image - drawing| / |drawing| of
    the domain's drawings, at least 0; |.| sums grey levels over pixels. 1: it is such a drawing; 0: as far
    from each of them as black is, or further.

    It sees frayed edges, specks and grey, not whether the right thing is shown (the verdict does), nor how
    varied images are.
    """
    drawings = ideals(domain).reshape(-1, SIDE * SIDE).astype(np.int16)
    off = np.abs(drawings - image.reshape(-1)).sum(axis=1)
    return max(0.0, float((1 - off / drawings.sum(axis=1)).max()))
