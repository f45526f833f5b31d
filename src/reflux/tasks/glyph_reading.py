"""Reads an image of glyphs with a program: the nearest digit, the number of squares, and the quality. It
needs numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reflux.tasks.glyph_drawing import NUMBERS, SHIFTS, SIDE, WHITE, Domain, ideals

# the largest number of pixels in which a digit may differ from the nearest drawing
MOST_OFF = 6
# the smallest number of pixels of a spot; smaller ones are not counted
LEAST_SPOT = 4


def checked(made: Any) -> np.ndarray:
    """Returns `made` if it is an image uint8 [16, 16]. ValueError for anything else."""
    if not isinstance(made, np.ndarray) or made.shape != (SIDE, SIDE) or made.dtype != np.uint8:
        what = f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
        raise ValueError(
            f"glyphs judges images of uint8 [{SIDE}, {SIDE}], got {what}. Use a flow model with one channel "
            f"and {SIDE} x {SIDE} pixels"
        )
    return made


def ink(image: np.ndarray) -> np.ndarray:
    """True at pixels that are nearer to white than to black, in the shape of `image`."""
    return 2 * image.astype(int) > WHITE


def is_right(image: np.ndarray, domain: Domain, number: int) -> bool:
    """True if the image shows `number`. domain "digits": the nearest drawn digit is `number`. Otherwise the
    number of spots (connected squares) is `number`.
    """
    return digit_in(image) == number if domain == "digits" else spots(image) == number


def digit_in(image: np.ndarray) -> int | None:
    """The digit whose nearest drawing, at any of its 9 positions, differs in the fewest pixels of ink. None
    if that is more than MOST_OFF pixels, or if two digits are equally near."""
    off = (ink(ideals("digits")) != ink(image)).sum(axis=(1, 2))
    nearest = off.reshape(len(NUMBERS["digits"]), len(SHIFTS) ** 2).min(axis=1)
    found = np.flatnonzero(nearest == nearest.min())
    return int(found[0]) if len(found) == 1 and nearest.min() <= MOST_OFF else None


def spots(image: np.ndarray) -> int:
    """The number of connected areas of ink (connected by sides) with at least LEAST_SPOT pixels."""
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
    """The quality of an image in [0, 1], independent of the prompt: the largest 1 - |image - drawing| /
    |drawing| over the drawings of the domain, and at least 0.

    |.| sums grey levels over pixels. 1: the image is such a drawing. 0: it is as far from each drawing as a
    black image, or further. The quality measures frayed edges, specks and grey. It does not measure whether
    the image shows what the prompt asks for (the verdict does), or how varied images are.
    """
    drawings = ideals(domain).reshape(-1, SIDE * SIDE).astype(np.int16)
    off = np.abs(drawings - image.reshape(-1)).sum(axis=1)
    return max(0.0, float((1 - off / drawings.sum(axis=1)).max()))
