"""The distance of each estimator's expected gradient from the exact one, as tables for docs/methods.md. All
sequences are enumerated; nothing is sampled.

The settings are those of law 1 (`estimators.py`), so a new setting there joins the tables. Every claim in the
text next to a table is computed from the numbers, or asserted of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from laws.drawing import Drawing, reverse_kl_inside
from laws.estimators import SETTINGS, Setting, choices, compare, expected_and_exact, world_of
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL

SEEDS = range(5)
# vocabulary, longest answer
WORLD = (6, 2)
# smaller, because every choice of siblings is enumerated
GROUP_WORLD = (4, 2)
# the list length k of the biased settings
K = 3
HEADER = "| objective | setting | cosine | relative norm |\n|---|---|---|---|"
COLUMNS = [
    (tail, support)
    for tail in choices(Divergence, "tail")
    for support in choices(Divergence, "support")
    if support != "full"
]


@functools.cache
def measured(setting: Setting, policy: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and relative norms over the worlds."""
    shape = GROUP_WORLD if setting.group else WORLD
    pairs = [compare(*expected_and_exact(world_of(*shape, seed), setting, policy)) for seed in SEEDS]
    cosines, norms = zip(*pairs, strict=True)
    return np.array(cosines), np.array(norms)


def is_exact(setting: Setting, policy: str | None = None) -> bool:
    """True if the setting is exact to the three digits that are printed."""
    return all(np.abs(values - 1).max() < 5e-4 for values in measured(setting, policy))


def digits(value: float) -> str:
    return f"{value:.3f}".replace("-0.000", "0.000")


def in_words(values: np.ndarray) -> str:
    mean, low, high = map(digits, (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def tables() -> Iterator[str]:
    """Markdown: the exact estimators, the biased ones, and the effect of staleness."""
    yield from exact_ones()
    yield from bounded_supports()
    yield from other_biased_ones()
    yield from under_staleness()
    yield from under_other_sampling()


def exact_ones() -> Iterator[str]:
    """One line per kind. Every setting is measured first."""
    yield "Unbiased: cosine 1.000 and norm 1.000 in every world, for every ratio, divergence and weight.\n"
    yield _exact_line("sampled_kl", lambda objective: f'`baseline = "{objective.baseline}"`')
    yield _exact_line(
        "divergence", lambda objective: f'`support = "{objective.support}"`' + _whole(objective)
    )
    yield _exact_line(
        "policy_gradient",
        lambda objective: f'the gradient under `ratio = "{objective.ratio}"` of the expected reward',
    )
    yield _exact_line("nll", lambda objective: "the forward KL, over answers of the teacher")
    yield ""


def _whole(objective: Divergence) -> str:
    return "" if objective.support == "full" else " with k >= V"


def _exact_line(kind: str, family: Callable[[Any], str]) -> str:
    held = [setting for setting in SETTINGS[kind] if setting.unbiased]
    assert all(is_exact(setting) for setting in held)
    words = dict.fromkeys(family(setting.objective) for setting in held)
    return f"- `{kind}`: {', '.join(words)} ({len(held)} setting{'s' if len(held) > 1 else ''})"


# --- divergences on a list of tokens


def bounded_supports() -> Iterator[str]:
    """A table with one row per divergence and one column per list and tail."""
    check_stored_lists()
    kinds = choices(Divergence, "divergence")
    yield f"Biased: divergences on a list of {K} tokens, attempts of the current student. Summary:\n"
    yield from summary(kinds)
    yield (
        "\nCosine, mean over five seeds (lowest of the five); the last row has all relative norms of a "
        "column, lowest to highest:\n"
    )
    yield "| `divergence` | " + " | ".join(f"{support}, {tail}" for tail, support in COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for kind in kinds:
        cells = [cosines(kind, *column) for column in COLUMNS]
        yield (
            f"| {kind} | "
            + " | ".join(f"{digits(cell.mean())} ({digits(cell.min())})" for cell in cells)
            + " |"
        )
    yield "| relative norm | " + " | ".join(_range(column, kinds) for column in COLUMNS) + " |"
    yield ""


def bounded(kind: str, tail: str, support: str) -> Setting:
    """The setting of the law for this cell."""
    (found,) = (
        s
        for s in SETTINGS["divergence"]
        if not s.unbiased
        and s.outputs == "full"
        and (s.objective.divergence, s.objective.tail, s.objective.support) == (kind, tail, support)
    )
    assert found.objective.k == K
    return found


def cosines(kind: str, tail: str, support: str) -> np.ndarray:
    return measured(bounded(kind, tail, support))[0]


def _range(column: tuple[str, str], kinds: tuple[str, ...]) -> str:
    norms = [measured(bounded(kind, *column))[1] for kind in kinds]
    return f"{digits(np.min(norms))} to {digits(np.max(norms))}"


def check_stored_lists() -> None:
    """A teacher that stored its K most likely tokens gives the column "teacher", so it needs no column."""
    for setting in (s for s in SETTINGS["divergence"] if s.outputs == "listed"):
        whole = measured(bounded(setting.objective.divergence, setting.objective.tail, "teacher"))
        assert all(
            np.abs(one - other).max() < 5e-4 for one, other in zip(measured(setting), whole, strict=True)
        )


def summary(kinds: tuple[str, ...]) -> Iterator[str]:
    """Sentences about the table, from its numbers."""
    mean = {(kind, *column): cosines(kind, *column).mean() for kind in kinds for column in COLUMNS}
    for kind in kinds:
        assert mean[kind, "bucket", "union"] > max(
            mean[kind, "bucket", "student"], mean[kind, "bucket", "teacher"]
        )
    union = [mean[kind, "bucket", "union"] for kind in kinds]
    yield (
        "- `union` with the bucket is closest to the exact gradient for every divergence: mean cosine "
        f"{digits(min(union))} or more."
    )
    student = [kind for kind in kinds if mean[kind, "bucket", "student"] > mean[kind, "bucket", "teacher"]]
    teacher = [kind for kind in kinds if kind not in student]
    yield (
        f"- Of the two single lists with the bucket, the student's is closer for {_and(student)}, "
        f"the teacher's for {_and(teacher)}."
    )
    assert all(
        mean[kind, "renormalised", support] < mean[kind, "bucket", support]
        for kind in kinds
        for _, support in COLUMNS
    )
    away = {
        support: [kind for kind in kinds if cosines(kind, "renormalised", support).min() < 0]
        for _, support in COLUMNS
    }
    turned = [f"`{support}` for {_and(found)}" for support, found in away.items() if found]
    yield (
        "- `renormalised` is further from the exact gradient than the bucket in every cell. A gradient with "
        "a cosine below 0 points away from the exact one. This happens in at least one of the five worlds "
        f"with: {'; '.join(turned) or 'none'}."
    )
    assert all(cosines(kind, "bucket", support).min() > 0 for kind in kinds for _, support in COLUMNS)
    yield (
        "- With the bucket no gradient points away. A teacher's stored list of the same tokens gives the "
        "same numbers as `teacher`."
    )
    yield _what_k_means()


def _and(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _what_k_means() -> str:
    """The share of the probability that the lists hold in the worlds, and the number of tokens of the
    union.
    """
    shares, tokens = [], []
    for seed in SEEDS:
        world = world_of(*WORLD, seed)
        student, teacher = (logits.detach().softmax(-1) for logits in (world.student, world.teacher))
        top = [table.topk(K, dim=-1) for table in (student, teacher)]
        shares.append([float(found.values.sum(-1).mean()) for found in top])
        tokens.append(
            np.mean(
                [
                    len({*one, *other})
                    for one, other in zip(*(found.indices.tolist() for found in top), strict=True)
                ]
            )
        )
    student_share, teacher_share = np.mean(shares, axis=0)
    return (
        f"- {K} of {WORLD[0]} tokens is half the vocabulary. Each list holds on average "
        f"{100 * student_share:.0f} % (student) and "
        f"{100 * teacher_share:.0f} % (teacher) of its model's probability; a union holds "
        f"{np.mean(tokens):.1f} tokens. With a real "
        "vocabulary a list is a far smaller part of the tokens, and its share of the probability depends on "
        "the models. The table shows which columns are biased and which of them turn the gradient. It does "
        "not show the size of the bias for other models."
    )


# --- the rest


def other_biased_ones() -> Iterator[str]:
    largest = max(gap(seed) for seed in SEEDS)
    assert largest < 10
    yield (
        "Biased: all other settings, on attempts of the current student; fields that are not shown have "
        "their default:\n"
    )
    yield HEADER
    for kind, settings in SETTINGS.items():
        yield from (
            _row(kind, s)
            for s in settings
            if not (s.unbiased or isinstance(s.objective, Divergence) or _another_ratio(s))
        )
    yield _row("sampled_kl", Setting(SampledKL(max_gap_nats=10.0), "reverse", unbiased=False, home="score"))
    yield ""
    yield (
        f"The largest gap of these worlds is {largest:.1f} nats, so a bound of 10 drops nothing here. If it "
        "drops positions, it is biased too. A bound of 1 drops the positions with the largest log-ratios, "
        "and the gradient of the others can point away from the exact one.\n"
    )


def gap(seed: int) -> float:
    """The largest |log p - log q| of a world, in nats."""
    world = world_of(*WORLD, seed)
    return float((world.student.detach().log_softmax(-1) - world.teacher.log_softmax(-1)).abs().max())


def _another_ratio(setting: Setting) -> bool:
    """True for SampledKL with a ratio that is not the default. On attempts of the current student all ratios
    are 1, so these settings are not listed.
    """
    return isinstance(setting.objective, SampledKL) and setting.objective != replace(
        setting.objective, ratio=SampledKL().ratio
    )


def under_staleness() -> Iterator[str]:
    cap, largest = SampledKL().ratio_cap, max(staleness_ratio(seed) for seed in SEEDS)
    assert Divergence().ratio_cap == cap > largest
    yield (
        "Attempts of an older student (its logits differ by 0.3 in standard deviation). The exact gradient "
        "is that at the prefixes it visited. The "
        f"largest p(a) / behaviour(a) here is {largest:.1f}: the default cap of {cap:g} was not reached, so "
        "`truncated` is exact. "
        "The rows with `ratio_cap = 1.0` show the effect of a cap that is reached.\n"
    )
    yield HEADER
    for ratio in choices(SampledKL, "ratio"):
        yield _row("sampled_kl", Setting(SampledKL(ratio=ratio), "reverse"), "lagged")
    yield _row("sampled_kl", Setting(SampledKL(ratio_cap=1.0), "reverse"), "lagged")
    for ratio in choices(Divergence, "ratio"):
        yield _row("divergence", Setting(Divergence(ratio=ratio), "reverse"), "lagged")
    yield _row("divergence", Setting(Divergence(ratio="truncated", ratio_cap=1.0), "reverse"), "lagged")
    yield ""


def staleness_ratio(seed: int) -> float:
    """The largest p(a) / behaviour(a) of a world's current and older student."""
    world = world_of(*WORLD, seed)
    return float((world.student.detach().log_softmax(-1) - world.lagged.log_softmax(-1)).max().exp())


def under_other_sampling() -> Iterator[str]:
    yield (
        "Attempts of the current student sampled from another distribution (`sampler.allow_biased`). The "
        "exact gradient is that over all tokens at the prefixes they visit. `ratio_cap = 1000.0` was not "
        "reached here: the ratio corrects the choice of tokens exactly at another temperature. With top-p "
        "it corrects the choice only among the tokens that can be sampled.\n"
    )
    yield HEADER
    objectives = [
        SampledKL(ratio_cap=1000.0),
        *(SampledKL(ratio=ratio) for ratio in choices(SampledKL, "ratio")),
    ]
    for temperature, top_p in ((0.7, 1.0), (1.0, 0.9)):
        drawings = [Drawing((*WORLD, seed), temperature, top_p) for seed in SEEDS]
        for objective in objectives:
            pairs = [
                compare(drawing.expected_gradient(objective), drawing.exact_gradient(_reverse_kl))
                for drawing in drawings
            ]
            numbers = tuple(np.array(column) for column in zip(*pairs, strict=True))
            assert top_p < 1 or objective.ratio_cap < 1000 or np.abs(np.array(numbers) - 1).max() < 5e-4
            name = Setting(objective, "reverse").name or "all at their defaults"
            yield _line("sampled_kl", f"`temperature = {temperature}, top_p = {top_p}`; {name}", *numbers)
    yield ""


def _reverse_kl(p: Any, q: Any, inside: Any) -> Any:
    return reverse_kl_inside(p, q, inside | ~inside)


def _row(kind: str, setting: Setting, policy: str | None = None) -> str:
    return _line(kind, setting.name or "all at their defaults", *measured(setting, policy))


def _line(kind: str, name: str, cosine: np.ndarray, norm: np.ndarray) -> str:
    return f"| `{kind}` | {name} | {in_words(cosine)} | {in_words(norm)} |"
