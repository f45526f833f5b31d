"""Glyphs, drawn by Pillow: a digit near the centre, or squares on a lattice. Images are uint8 [16, 16], 0
black and 255 white.

. . # # # # # # . .       a digit is 3 x 5 dots of 2 x 2 pixels,           # # # . . # # # . .      a square is 3 x 3 pixels,
. . # # # # # # . .       at most one pixel off the centre                 # # # . . # # # . .      2 apart, on a lattice of
. . # # . . # # . .       each way: 9 places                               # # # . . # # # . .      3 x 3 places
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
# where a digit in the centre begins
LEFT, TOP = 5, 3
# pixels off the centre, each way
SHIFTS = (-1, 0, 1)
# pixels: a square's side, from one square to the next, and before the first
SQUARE, PITCH, EDGE = 3, 5, 1
# places on the lattice, row by row
CELLS = 9

NUMBERS: dict[Domain, range] = {"digits": range(len(FONT)), "counts": range(1, CELLS + 1)}


def asked(prompt: Prompt) -> tuple[Domain, int]:
    """What a prompt of this task asks for. ValueError for a prompt of another task."""
    for domain, numbers in NUMBERS.items():
        if prompt.route == domain:
            found = [number for number in numbers if prompt.answer == str(number)]
            if found:
                return domain, found[0]
    raise ValueError(
        f"prompt {prompt.id} asks for no glyph: its route is {prompt.route!r} and its answer "
        f"{prompt.answer!r}, where 'digits' with 0 to "
        f"9 or 'counts' with 1 to {CELLS} is needed; glyphs must grade its own prompts"
    )


def draw(prompt: Prompt, rng: random.Random) -> np.ndarray:
    """An image of what the prompt asks for, without a flaw; the random numbers choose the place, or the
    places. uint8 [16, 16].
    """
    domain, number = asked(prompt)
    if domain == "digits":
        return digit(number, rng.choice(SHIFTS), rng.choice(SHIFTS))
    return squares(rng.sample(range(CELLS), number))


def digit(value: int, right: int = 0, down: int = 0) -> np.ndarray:
    """The digit `value`, so many pixels off the centre. uint8 [16, 16]."""
    rows = FONT[value].split()
    dots = [
        (LEFT + right + DOT * x, TOP + down + DOT * y)
        for y, row in enumerate(rows)
        for x, dot in enumerate(row)
        if dot == "#"
    ]
    return _boxes(dots, DOT)


def squares(cells: Collection[int]) -> np.ndarray:
    """A square on each of these places of the lattice. uint8 [16, 16]."""
    return _boxes([(EDGE + PITCH * (cell % 3), EDGE + PITCH * (cell // 3)) for cell in cells], SQUARE)


@cache
def ideals(domain: Domain) -> np.ndarray:
    """Every image that can be drawn in a domain, in the order of `owners`. uint8 [images, 16, 16]: 90 digits,
    511 sets of squares.
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
    # kept for the next caller
    whole.setflags(write=False)
    return whole


def _boxes(corners: Collection[tuple[int, int]], side: int) -> np.ndarray:
    """White boxes on black, by their upper left corners (x, y)."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for x, y in corners:
        pen.rectangle((x, y, x + side - 1, y + side - 1), fill=WHITE)
    return np.array(image, dtype=np.uint8)
