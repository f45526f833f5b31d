"""Draws glyphs with Pillow: a digit near the centre, or squares on a lattice. Images are uint8 [16, 16]; 0 is
black and 255 white.

. . # # # # # # . .    a digit is 3 x 5 dots of 2 x 2      # # # . . # # # . .    a square is 3 x 3 pixels;
. . # # # # # # . .    pixels, at most one pixel off       # # # . . # # # . .    squares are 2 pixels apart
. . # # . . # # . .    the centre in x and y               # # # . . # # # . .    on a lattice of 3 x 3
                       (9 positions)                                              positions
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection
from functools import cache
from typing import Literal, get_args

import numpy as np

from reflux.types import Prompt

Domain = Literal["digits", "counts"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

SIDE = 16
WHITE = 255
FONT = (
    "### #.# #.# #.# ###",
    ".#. ##. .#. .#. ###",
    "### ..# ### #.. ###",
    "### ..# ### ..# ###",
    "#.# #.# ### ..# ..#",
    "### #.. ### ..# ###",
    "### #.. ### #.# ###",
    "### ..# ..# ..# ..#",
    "### #.# ### #.# ###",
    "### #.# ### ..# ###",
)
# a dot of the font is DOT x DOT pixels
DOT = 2
# the upper left corner of a digit in the centre, in pixels
LEFT, TOP = 5, 3
# the shifts of a digit from the centre in x and in y, in pixels
SHIFTS = (-1, 0, 1)
# in pixels: the side of a square, the distance from one square to the next, and the margin before the first
SQUARE, PITCH, EDGE = 3, 5, 1
# the number of positions on the lattice, row by row
CELLS = 9

NUMBERS: dict[Domain, range] = {"digits": range(len(FONT)), "counts": range(1, CELLS + 1)}


def asked(prompt: Prompt) -> tuple[Domain, int]:
    """The domain and the number of a prompt of the task `glyphs`. ValueError for a prompt of another task."""
    for domain, numbers in NUMBERS.items():
        if prompt.route == domain:
            found = [number for number in numbers if prompt.answer == str(number)]
            if found:
                return domain, found[0]
    raise ValueError(
        f"prompt {prompt.id} asks for no glyph: its route is {prompt.route!r} and its answer "
        f"{prompt.answer!r}, but route 'digits' needs an answer from 0 to 9, and route 'counts' one from 1 "
        f"to {CELLS}. The task glyphs can only judge its own prompts"
    )


def draw(prompt: Prompt, rng: random.Random) -> np.ndarray:
    """A perfect image for the prompt, uint8 [16, 16]. rng: chooses the position of the digit, or the
    positions of the squares.
    """
    domain, number = asked(prompt)
    if domain == "digits":
        return digit(number, rng.choice(SHIFTS), rng.choice(SHIFTS))
    return squares(rng.sample(range(CELLS), number))


def digit(value: int, right: int = 0, down: int = 0) -> np.ndarray:
    """The digit `value`, shifted from the centre by `right` and `down` pixels. uint8 [16, 16]."""
    rows = FONT[value].split()
    dots = [
        (LEFT + right + DOT * x, TOP + down + DOT * y)
        for y, row in enumerate(rows)
        for x, dot in enumerate(row)
        if dot == "#"
    ]
    return _boxes(dots, DOT)


def squares(cells: Collection[int]) -> np.ndarray:
    """A square at each of these positions of the lattice. uint8 [16, 16]."""
    return _boxes([(EDGE + PITCH * (cell % 3), EDGE + PITCH * (cell // 3)) for cell in cells], SQUARE)


@cache
def ideals(domain: Domain) -> np.ndarray:
    """Every image that can be drawn in a domain, number by number. uint8 [images, 16, 16]: 90 digits, 511
    sets of squares.
    """
    if domain == "digits":
        images = [
            digit(value, right, down) for value in NUMBERS["digits"] for right in SHIFTS for down in SHIFTS
        ]
    else:
        images = [
            squares(cells)
            for number in NUMBERS["counts"]
            for cells in itertools.combinations(range(CELLS), number)
        ]
    whole = np.stack(images)
    # Read-only, because the cache returns the same array to every caller.
    whole.setflags(write=False)
    return whole


def _boxes(corners: Collection[tuple[int, int]], side: int) -> np.ndarray:
    """White boxes on black, given by their upper left corners (x, y)."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for x, y in corners:
        pen.rectangle((x, y, x + side - 1, y + side - 1), fill=WHITE)
    return np.array(image, dtype=np.uint8)
