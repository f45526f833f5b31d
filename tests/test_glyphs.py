"""Glyphs: prompts that can be taken up anywhere, images that are what was asked for, and verdicts and quality
from their definitions.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from reflux.config.registry import make, part
from reflux.errors import ConfigError
from reflux.grading.graders import Graders
from reflux.tasks.base import Split
from reflux.tasks.glyph_drawing import DOMAINS, FONT, asked, digit, draw, ideals, squares
from reflux.tasks.glyph_reading import digit_in, ink, quality, spots
from reflux.tasks.glyphs import Glyphs, text_of
from reflux.types import Prompt

TASK = Glyphs(largest_count=9)
PROMPTS = [
    Prompt(id=f"{route}-{n}", messages=(), answer=str(n), route=route)
    for route, low in (("digits", 0), ("counts", 1))
    for n in range(low, 10)
]
untimed = settings(deadline=None)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEVELS = np.array([0, 127, 128, 255], np.uint8)


def noise(seed: int, share: float) -> np.ndarray:
    """Pixels of which about so many are ink."""
    rng = np.random.default_rng(seed)
    return LEVELS[rng.integers(2, size=(16, 16)) + 2 * (rng.random((16, 16)) < share)]


PICTURES = st.one_of(
    arrays(np.uint8, (16, 16), elements=st.sampled_from(LEVELS.tolist())),
    st.builds(noise, st.integers(0, 2**32), st.floats(0.05, 0.9)),
)


def take(task=TASK, split: Split = "train", count=300, seed=0, start=0) -> list[Prompt]:
    return list(islice(task.prompts(split, seed, start), count))


def text(prompt: Prompt) -> str:
    assert len(prompt.messages) == 1
    assert prompt.messages[0]["role"] == "user"
    return prompt.messages[0]["content"]


# --------------------------------------------------------------------------------------------------
# prompts


def test_a_prompt_says_in_words_what_its_route_and_answer_say():
    assert {text(prompt): (prompt.route, prompt.answer) for prompt in take(Glyphs())} == {
        **{f"the digit {n}": ("digits", str(n)) for n in range(10)},
        "1 square": ("counts", "1"),
        **{f"{n} squares": ("counts", str(n)) for n in range(2, 7)},
    }
    assert sorted(Glyphs().texts()) == sorted({text(prompt) for prompt in take(Glyphs())})
    assert Glyphs(domains=("counts",), largest_count=2).texts() == ["1 square", "2 squares"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "task", [Glyphs(), Glyphs(domains=("counts", "digits"), largest_count=4), Glyphs(domains=("digits",))]
)
def test_any_position_can_be_started_from(task, split):
    whole = take(task, split, 120, seed=3)
    for start in (1, 7, 32, 119):
        assert take(task, split, 120 - start, seed=3, start=start) == whole[start:]
    assert take(task, split, 120, seed=4) != whole


def test_a_far_position_makes_no_prompt_before_it(monkeypatch):
    made = []
    monkeypatch.setattr(Glyphs, "_prompt", lambda self, split, seed, position: made.append(position))
    take(count=2, start=10**12)
    assert made == [10**12, 10**12 + 1]


@untimed
@given(st.integers(0, 2**40), st.sampled_from(["train", "test"]))
def test_every_stretch_of_even_length_is_half_of_each_domain(seed, split):
    prompts = take(Glyphs(), split, 60, seed)
    assert all({one.route, other.route} == {"digits", "counts"} for one, other in itertools.pairwise(prompts))
    digits, counts = ([prompt.answer for prompt in prompts if prompt.route == route] for route in DOMAINS)
    # 30 of 10 different ones: every round holds each once
    assert Counter(digits) == {str(n): 3 for n in range(10)}
    assert Counter(counts) == {str(n): 5 for n in range(1, 7)}
    assert all(len(set(digits[first : first + 10])) == 10 for first in (0, 10, 20))


def test_the_order_of_a_round_is_drawn_anew_and_differs_between_seeds_and_splits():
    def orders(seed, split: Split):
        digits = [prompt.answer for prompt in take(Glyphs(domains=("digits",)), split, 50, seed)]
        return [tuple(digits[first : first + 10]) for first in range(0, 50, 10)]

    found = [order for seed in (0, 1) for split in SPLITS for order in orders(seed, split)]
    assert len(set(found)) == len(found)


def test_ids_never_repeat_and_say_the_same_whatever_the_seed_and_the_order():
    by_id = {}
    for seed, split, task in itertools.product(
        (0, 1), SPLITS, (Glyphs(), Glyphs(domains=("counts", "digits")))
    ):
        prompts = take(task, split, 480, seed)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert by_id.setdefault((split, prompt.id), prompt) == prompt
    # no split has an id of another, and both seeds have the same ones
    assert len({key for _, key in by_id}) == len(by_id) == 3 * 480


def test_held_out_splits_end_and_training_does_not():
    task = Glyphs(held_out=7)
    assert len(list(task.prompts("test", 0))) == len(list(task.prompts("validation", 0))) == 7
    assert list(task.prompts("test", 0, start=7)) == []
    assert len(take(task, count=5000)) == 5000
    whole = Counter(text(prompt) for prompt in Glyphs().prompts("test", 0))
    assert whole == {
        **{text_of("digits", n): 24 for n in range(10)},
        **{text_of("counts", n): 40 for n in range(1, 7)},
    }


def test_routes_are_those_of_the_prompts():
    for task in (Glyphs(), Glyphs(domains=("digits",)), Glyphs(domains=("counts",))):
        assert task.routes == {prompt.route for prompt in take(task, count=4)}


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"domains": []}, "at least one of digits, counts"),
        ({"domains": ["digits", "digits"]}, "each once"),
        ({"domains": ["letters"]}, "digits"),
        ({"largest_count": 0}, "between 1 and 9"),
        ({"largest_count": 10}, "between 1 and 9"),
        ({"held_out": -1}, "held_out must not be negative"),
        ({"weight": 0}, "weight must be above 0"),
        ({"sizes": 3}, "sizes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, outputs):
    with pytest.raises((ConfigError, ValueError), match=outputs):
        make(part("tasks", "glyphs"), settings, "task")


def test_a_prompt_is_answered_in_one_turn():
    assert TASK.open_env(PROMPTS[0], 0) is None


# --------------------------------------------------------------------------------------------------
# images


def test_a_digit_is_its_dots_doubled_within_one_pixel_of_the_centre():
    for n, right, down in itertools.product(range(10), (-1, 0, 1), (-1, 0, 1)):
        dots = np.array([[dot == "#" for dot in row] for row in FONT[n].split()])
        assert dots.shape == (5, 3)
        whole = np.zeros((16, 16), np.uint8)
        whole[3 + down : 13 + down, 5 + right : 11 + right] = 255 * np.kron(dots, np.ones((2, 2), np.uint8))
        assert np.array_equal(digit(n, right, down), whole)


def test_squares_stand_apart_on_a_lattice():
    whole = squares(range(9))
    rows = np.flatnonzero(whole.any(axis=0))
    assert rows.tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert np.array_equal(whole, 255 * np.outer(whole.any(axis=0), whole.any(axis=0)))
    for cell in range(9):
        alone = np.argwhere(squares([cell]))
        assert alone.min(axis=0).tolist() == [1 + 5 * (cell // 3), 1 + 5 * (cell % 3)]
        assert np.ptp(alone, axis=0).tolist() == [2, 2]
        assert len(alone) == 9


def test_the_dice_choose_every_place_and_every_set_of_places_and_nothing_else():
    for prompt in PROMPTS:
        drawn = {draw(prompt, random.Random(seed)).tobytes() for seed in range(3000)}
        domain, number = asked(prompt)
        drawings = ideals(domain)
        owned = {
            image.tobytes()
            for image in drawings
            if (digit_in(image) if domain == "digits" else spots(image)) == number
        }
        assert drawn == owned
        assert np.array_equal(draw(prompt, random.Random(5)), draw(prompt, random.Random(5)))


def test_there_are_90_digits_and_511_sets_of_squares_all_different_and_far_apart():
    for domain, many, apart in (("digits", 90, 4), ("counts", 511, 9)):
        drawings = ideals(domain)
        assert drawings.shape == (many, 16, 16)
        assert drawings.dtype == np.uint8
        assert set(np.unique(drawings)) == {0, 255}
        flat = drawings.reshape(many, -1).astype(bool)
        off = (flat[:, None] != flat[None]).sum(axis=2)
        assert off[~np.eye(many, dtype=bool)].min() >= apart
        with pytest.raises(ValueError, match="read-only"):
            drawings[0, 0, 0] = 1


# --------------------------------------------------------------------------------------------------
# verdicts


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
def test_what_is_drawn_is_right_clean_and_right_for_that_prompt_alone(prompt):
    for seed in range(40):
        image = draw(prompt, random.Random(seed))
        verdicts = {other.id: TASK.verify(other, image) for other in PROMPTS if other.route == prompt.route}
        assert {name for name, reward in verdicts.items() if reward.value == 1.0} == {prompt.id}
        assert {reward.value for reward in verdicts.values()} == {0.0, 1.0}
        assert all(reward.parts == {"quality": 1.0} for reward in verdicts.values())


def nearest(image: np.ndarray) -> dict[int, int]:
    """Pixels between an image and the nearest drawing of each digit, one drawing at a time."""
    return {
        n: min(int(((digit(n, x, y) > 127) != (image > 127)).sum()) for x in (-1, 0, 1) for y in (-1, 0, 1))
        for n in range(10)
    }


@untimed
@given(st.integers(0, 9), st.integers(0, 2**32), st.integers(0, 12))
def test_a_digit_is_right_if_it_alone_is_nearest_and_at_most_six_pixels_off(n, seed, flips):
    rng = random.Random(seed)
    image = draw(Prompt(id="", messages=(), answer=str(n), route="digits"), rng)
    for place in rng.sample(range(256), flips):
        image[divmod(place, 16)] ^= 255
    off = nearest(image)
    for prompt in PROMPTS[:10]:
        asked_for = int(prompt.answer or "")
        others = min(off[other] for other in off if other != asked_for)
        assert TASK.verify(prompt, image).value == float(off[asked_for] <= 6 and off[asked_for] < others)


def test_six_pixels_off_is_right_seven_is_wrong_and_between_two_digits_is_neither():
    one = digit(1)
    # of no digit at any place
    corners = [(0, 0), (0, 15), (15, 0), (15, 15), (0, 7), (15, 7), (7, 0)]
    for count in (6, 7):
        spoilt = one.copy()
        for place in corners[:count]:
            spoilt[place] = 255
        assert digit_in(spoilt) == (1 if count == 6 else None)
    eight, nought = digit(8), digit(0)
    differing = np.argwhere(eight != nought)
    assert len(differing) == 4
    between = eight.copy()
    for y, x in differing[:2]:
        between[y, x] = nought[y, x]
    assert nearest(between)[8] == nearest(between)[0] == 2
    assert digit_in(between) is None


@untimed
@given(PICTURES)
def test_spots_are_the_4_connected_components_of_four_pixels_or_more(image):
    labels = np.zeros((16, 16), int)
    # its default: joined by sides
    ndimage.label(image > 127, output=labels)
    counted = int((np.bincount(labels[labels > 0]) >= 4).sum())
    assert spots(image) == counted
    for prompt in PROMPTS[10:]:
        assert TASK.verify(prompt, image).value == float(counted == int(prompt.answer or ""))


def test_a_speck_does_not_count_and_a_bridge_makes_one_of_two():
    two = squares([0, 1])
    assert spots(two) == 2
    # three pixels
    two[15, 13:16] = 255
    assert spots(two) == 2
    # and a fourth
    two[14, 15] = 255
    assert spots(two) == 3
    two[2, 4] = two[2, 5] = 255
    assert spots(two) == 2
    corner = np.zeros((16, 16), np.uint8)
    # they touch at a corner only
    corner[0:2, 0:2] = corner[2:4, 2:4] = 255
    assert spots(corner) == 2
    snake = np.zeros((16, 16), np.uint8)
    snake[::2] = 255
    snake[1::4, 15] = snake[3::4, 0] = 255
    assert spots(snake) == 1
    assert spots(np.full((16, 16), 255, np.uint8)) == 1
    assert spots(np.zeros((16, 16), np.uint8)) == 0


def test_ink_is_what_is_brighter_than_half():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(ink(levels), levels >= 128)


# --------------------------------------------------------------------------------------------------
# quality


@pytest.mark.parametrize("domain", DOMAINS)
@untimed
@given(image=arrays(np.uint8, (16, 16)))
def test_quality_is_one_less_the_smallest_error_per_ink_of_a_drawing(domain, image):
    errors = [np.abs(one.astype(float) - image).sum() / one.sum(dtype=float) for one in ideals(domain)]
    assert quality(image, domain) == pytest.approx(max(0.0, 1 - min(errors)), abs=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_quality_falls_from_one_to_nothing_with_every_further_flaw(domain):
    whole = ideals(domain)[0]
    on = np.argwhere(whole)
    spoilt, before = whole.copy(), 1.0
    for y, x in on[: len(on) // 3]:
        spoilt[y, x] = 0
        assert quality(spoilt, domain) < before
        before = quality(spoilt, domain)
    assert quality(np.zeros((16, 16), np.uint8), domain) == 0
    assert quality(255 - whole, domain) == 0
    # a fifth of the ink is missing
    assert quality(np.where(whole > 0, 204, 0).astype(np.uint8), domain) == pytest.approx(0.8)


@untimed
@given(st.sampled_from(PROMPTS), st.sampled_from(PROMPTS), st.integers(0, 99))
def test_quality_does_not_ask_what_was_asked_for(prompt, other, seed):
    if prompt.route == other.route:
        image = draw(prompt, random.Random(seed)) // 2
        assert TASK.verify(prompt, image).parts == TASK.verify(other, image).parts


# --------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "made",
    [
        "7",
        None,
        [[0] * 16] * 16,
        np.zeros((16, 16)),
        np.zeros((16, 16), bool),
        np.zeros((16, 16), np.int8),
        np.zeros((16, 16, 1), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((1, 16, 16), np.uint8),
        np.zeros((15, 16), np.uint8),
        np.zeros(256, np.uint8),
        np.zeros((0,), np.uint8),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused_in_a_sentence(made):
    for prompt in (PROMPTS[0], PROMPTS[-1]):
        with pytest.raises(
            ValueError, match=r"glyphs judges images of uint8 \[16, 16\], got .+\. Use a flow model"
        ):
            TASK.verify(prompt, made)


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        (None, "7"),
        ("letters", "7"),
        ("digits", None),
        ("digits", "10"),
        ("digits", "07"),
        ("counts", "0"),
        ("counts", "-1"),
        ("counts", "10"),
        ("counts", "many"),
    ],
)
def test_a_prompt_of_another_task_is_refused_in_a_sentence(route, answer):
    prompt = Prompt(id="p7", messages=(), answer=answer, route=route)
    for call in (lambda: TASK.verify(prompt, digit(7)), lambda: draw(prompt, random.Random(0))):
        with pytest.raises(ValueError, match="prompt p7 asks for no glyph: its route is"):
            call()


def test_judging_imports_no_torch_and_works_in_a_worker():
    code = (
        "import sys; from reflux.tasks.glyphs import Glyphs; g = Glyphs(); p = next(g.prompts('test', 0));"
        "assert not {'torch', 'PIL', 'scipy', 'diffusers'} & set(sys.modules), 'too much for a value';"
        "import numpy as np; g.verify(p, np.zeros((16, 16), np.uint8));"
        "assert not {'torch', 'scipy', 'diffusers', 'transformers'} & set(sys.modules), 'too much for a "
        "verdict'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    graders = Graders(workers=1, timeout_s=60)
    try:
        jobs = [
            (PROMPTS[7], digit(7)),
            (PROMPTS[7], digit(1)),
            (PROMPTS[12], squares([0, 4, 8])),
            (PROMPTS[12], "no image"),
        ]
        verdicts = asyncio.run(graders.verify_many(TASK, jobs))
    finally:
        graders.close()
    assert [verdict.value for verdict in verdicts] == [1.0, 0.0, 1.0, None]
    assert "glyphs judges images" in (verdicts[3].error or "")
