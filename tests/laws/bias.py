"""How far each estimator's expected gradient is from the exact one, as tables for docs/methods.md: enumerated, nothing is drawn.

The settings are those of law 1 (`estimators.py`), so whatever joins the menu joins the tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from laws.estimators import SETTINGS, Setting, choices, compare, expected_and_exact, world_of
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL

SEEDS = range(5)
WORLD = (6, 2)  # vocabulary, longest answer
GROUP_WORLD = (4, 2)  # every choice of siblings is gone through


@functools.cache
def measured(setting: Setting, policy: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and relative norms over the worlds."""
    shape = GROUP_WORLD if setting.group else WORLD
    pairs = [compare(*expected_and_exact(world_of(*shape, seed), setting, policy)) for seed in SEEDS]
    cosines, norms = zip(*pairs, strict=True)
    return np.array(cosines), np.array(norms)


def is_exact(setting: Setting, policy: str | None = None) -> bool:
    """To the three digits that are printed."""
    return all(np.abs(values - 1).max() < 5e-4 for values in measured(setting, policy))


def in_words(values: np.ndarray) -> str:
    mean, low, high = (f"{value:.3f}".replace("-0.000", "0.000") for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def tables() -> Iterator[str]:
    """Markdown: what is exact, what is not, and what lag does."""
    yield from exact_ones()
    yield from biased_ones()
    yield from under_lag()


def exact_ones() -> Iterator[str]:
    """One line per kind, after a measurement of every setting."""
    yield "Unbiased: cosine 1.000 and norm 1.000 in every world, for every ratio, divergence and weight.\n"
    yield _exact_line("sampled_kl", lambda objective: f'`baseline = "{objective.baseline}"`')
    yield _exact_line("divergence", lambda objective: f'`support = "{objective.support}"`' + _whole(objective))
    yield _exact_line("outcome", lambda objective: f'the gradient under `ratio = "{objective.ratio}"` of the expected reward')
    yield _exact_line("nll", lambda objective: "the forward KL, over answers of the teacher")
    yield ""


def _whole(objective: Divergence) -> str:
    return "" if objective.support == "full" else " with k >= V"


def _exact_line(kind: str, family: Callable[[Any], str]) -> str:
    held = [setting for setting in SETTINGS[kind] if setting.unbiased]
    assert all(is_exact(setting) for setting in held)
    words = dict.fromkeys(family(setting.objective) for setting in held)
    return f"- `{kind}`: {', '.join(words)} ({len(held)} setting{'s' if len(held) > 1 else ''})"


def biased_ones() -> Iterator[str]:
    yield "Biased, on attempts of the student of now; what is not written is at its default:\n"
    yield "| objective | setting | cosine | relative norm |\n|---|---|---|---|"
    yield from (_row(kind, s) for kind, settings in SETTINGS.items() for s in settings if not s.unbiased and not _said_already(s))
    yield ""


def _said_already(setting: Setting) -> bool:
    """A stored list is the same as the teacher's k likeliest tokens, and on the student's own attempts all ratios are 1."""
    return setting.says == "listed" or (isinstance(setting.objective, SampledKL) and setting.objective.ratio != SampledKL().ratio)


def under_lag() -> Iterator[str]:
    yield "Attempts of an older student (logits off by 0.3 in standard deviation); exact is the gradient at the prefixes it visited:\n"
    yield "| objective | setting | cosine | relative norm |\n|---|---|---|---|"
    for ratio in choices(SampledKL, "ratio"):
        yield _row("sampled_kl", Setting(SampledKL(ratio=ratio), "reverse"), "lagged")
    yield _row("sampled_kl", Setting(SampledKL(ratio_cap=1.0), "reverse"), "lagged")
    for ratio in choices(Divergence, "ratio"):
        yield _row("divergence", Setting(Divergence(ratio=ratio), "reverse"), "lagged")
    yield _row("divergence", Setting(Divergence(ratio="truncated", ratio_cap=1.0), "reverse"), "lagged")
    yield ""


def _row(kind: str, setting: Setting, policy: str | None = None) -> str:
    cosines, norms = measured(setting, policy)
    return f"| `{kind}` | {setting.name or 'all at their defaults'} | {in_words(cosines)} | {in_words(norms)} |"
