"""The release rule with a known collapse: a teacher whose distribution becomes flat after a random position,
and the parts for the other arms of the study.

The first command runs every arm on every seed and prints the table of accuracies. The second one compares the
release points that were found with the true positions:

    python studies/run.py studies/release.toml --out runs/release
    python studies/collapse.py runs/release

studies/release.toml names the parts below by their dotted kinds. The position of the collapse depends only on
(seed, step, prompt, sample, length), so the second command computes the true positions again and needs only
the run directories.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.context import PartContext
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.learners.hf import HF
from reflux.models.heads import Heads
from reflux.runtime.services import Services
from reflux.runtime.weights import Weights
from reflux.teachers.base import TeacherRequest
from reflux.teachers.local import Local
from reflux.types import Attempt, Credit, Group, HiddenTarget, Rollout, TeacherAnswer, TokenRollout

# The position of the collapse is uniform between these shares of an attempt. At 1 or more there is no
# collapse.
FIRST, LAST = 0.2, 1.2


def collapse(step_context: StepContext, prompt: str, sample: int, length: int) -> int:
    """The first position at which the teacher is flat. `length` if it does not collapse."""
    return min(length, round(step_context.rng("collapse", prompt, sample).uniform(FIRST, LAST) * length))


@dataclass(frozen=True, config=STRICT)
class Collapsing(Local):
    """A local teacher whose logits are multiplied by `left` from a random position on: 0 is a uniform
    distribution, 1 no collapse.
    """

    left: float = 0.1

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[Any]:
        async with Local.open(self, context, services) as opened:
            read, follow, step = opened.score, opened.publish, 0

            async def publish(weights: Weights, done: int) -> None:
                nonlocal step
                step = done
                await follow(weights, done)

            async def score(requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
                answers, step_context = await read(requests), StepContext(step, context.seed)
                pairs = zip(requests, answers, strict=True)
                return [
                    flatten(request.rollout, answer, self.left, step_context, services.heads)
                    for request, answer in pairs
                ]

            opened.score, opened.publish = score, publish
            yield opened


def flatten(
    rollout: Rollout, answer: TeacherAnswer, left: float, step_context: StepContext, heads: Heads
) -> TeacherAnswer:
    """Scale the last hidden states. This scales the logits of a head that is a matrix. Outputs that were
    computed from the hidden states are computed again.
    """
    target, listed = answer.target, answer.candidates
    assert isinstance(target, HiddenTarget)
    assert isinstance(rollout, TokenRollout)
    h_TH = target.h_TH.clone()
    h_TH[collapse(step_context, rollout.prompt.id, rollout.sample, rollout.length) :] *= left
    flat = dataclasses.replace(target, h_TH=h_TH, logp_T=None)
    if target.logp_T is not None:
        flat = dataclasses.replace(flat, logp_T=flat.sampled_logp_T(rollout, heads))
    if listed is not None:
        listed = dataclasses.replace(listed, logp_TK=flat.logp_at(listed.ids_TK, heads), logp_T=flat.logp_T)
    return dataclasses.replace(answer, target=flat, candidates=listed)


def cut(mask_T: np.ndarray, end: int) -> np.ndarray:
    """Weights that keep the positions before `end` (at least one chosen position) and the total weight."""
    end = max(end, int(np.flatnonzero(mask_T)[0]) + 1)
    kept_T = mask_T & (np.arange(len(mask_T)) < end)
    return (kept_T * (mask_T.sum() / kept_T.sum())).astype(np.float32)


@dataclass(frozen=True, config=STRICT)
class Oracle(CreditPart):
    """Releases each attempt exactly where the teacher becomes flat."""

    gives_offsets: ClassVar[bool] = False
    min_group: ClassVar[int] = 1

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt, step_context) for attempt in group]

    def _share(self, attempt: Attempt, step_context: StepContext) -> Credit:
        rollout = attempt.rollout
        if not rollout.mask_T.any():
            return Credit()
        return Credit(
            weight_T=cut(
                rollout.mask_T, collapse(step_context, rollout.prompt.id, rollout.sample, rollout.length)
            )
        )


@dataclass(frozen=True, config=STRICT)
class Shuffling(HF):
    """The default learner, with the release points, as shares of the attempt length, given to other attempts
    of the batch.
    """

    # The credit rule whose release points are shuffled.
    rule: str = "release"

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[Any]:
        async with HF.open(self, context, services) as opened:
            move = opened.step

            async def step(groups: Sequence[Group], objectives: Any, step_context: StepContext) -> Any:
                shuffle(groups, self.rule, step_context)
                return await move(groups, objectives, step_context)

            opened.step = step
            yield opened


def shuffle(groups: Sequence[Group], rule: str, step_context: StepContext) -> None:
    """Give each attempt the kept share of another attempt (1 if that attempt is not released)."""
    attempts = [attempt for group in groups for attempt in group if attempt.rollout.mask_T.any()]
    shares = [
        float((np.broadcast_to(a.credits[rule].weight_T, a.rollout.length)[a.rollout.mask_T] > 0).mean())
        for a in attempts
    ]
    step_context.rng("shuffle").shuffle(shares)
    for attempt, kept in zip(attempts, shares, strict=True):
        mask_T = attempt.rollout.mask_T
        last = np.flatnonzero(mask_T)[max(1, round(kept * int(mask_T.sum()))) - 1]
        attempt.credits[rule] = dataclasses.replace(
            attempt.credits[rule], weight_T=cut(mask_T, int(last) + 1)
        )


# --- found against true


@dataclasses.dataclass(frozen=True)
class Point:
    """One attempt: its length, the position where the teacher became flat, and the position where it was
    released (None: not released).
    """

    length: int
    true: int
    found: int | None


def points(run_dir: Path) -> Iterator[Point]:
    """Every attempt of a run for which the rule recorded details."""
    seed = tomllib.loads((run_dir / "config.toml").read_text())["seed"]
    lengths: dict[tuple[int, str, int], int] = {}
    with (run_dir / "attempts.jsonl").open() as lines:
        for line in map(json.loads, lines):
            key = (line["step"], line["prompt"], line["sample"])
            if line["kind"] == "attempt":
                lengths[key] = len(line["tokens"])
            elif "release" in line.get("detail", {}):
                said = line["detail"]["release"]
                found = said["starts"][said["kept"]] if said["kept"] < len(said["starts"]) else None
                yield Point(
                    lengths[key],
                    collapse(
                        StepContext(line["step"] - 1, seed), line["prompt"], line["sample"], lengths[key]
                    ),
                    found,
                )


def row(name: str, found: list[Point]) -> str:
    """One line of the table. Misses are in tokens, over released attempts whose teacher became flat.
    `constant` is the miss of a constant guess at the mean true position.
    """
    flat, sound = ([p for p in found if (p.true < p.length) == fell] for fell in (True, False))
    cells = [
        name,
        f"{len(found):,}",
        *(
            f"{sum(p.found is not None for p in part) / max(1, len(part)):.1%}"
            for part in (found, flat, sound)
        ),
    ]
    released = [point for point in flat if point.found is not None]
    if len(released) > 2:
        misses = [point.found - point.true for point in released if point.found is not None]
        middle = statistics.mean(point.true for point in released)
        pairs = [
            (point.found / point.length, point.true / point.length)
            for point in released
            if point.found is not None
        ]
        cells += [
            f"{statistics.median((point.found or 0) / point.length for point in released):.0%}",
            f"{statistics.median(map(abs, misses)):.1f}",
            f"{statistics.median(abs(point.true - middle) for point in released):.1f}",
            f"{statistics.mean(misses):+.1f}",
            f"{np.corrcoef(np.asarray(pairs).T)[0, 1]:.2f}",
        ]
    return "| " + " | ".join([*cells, *["–"] * (10 - len(cells))]) + " |"


def table(out: Path) -> str:
    """A Markdown table of the arms with the release rule, over all seeds. For a natural teacher only
    `released` is meaningful.
    """
    names = (
        "arm, attempts, released, of those flattened, of others, median share kept, median miss, constant, "
        "mean miss, correlation"
    )
    head = f"| {' | '.join(names.split(', '))} |\n|{'---|' * 10}\n"
    arms = {
        arm: [p for run in sorted(arm.glob("seed-*/")) for p in points(run)]
        for arm in sorted(out.iterdir())
        if arm.is_dir()
    }
    return head + "".join(f"{row(arm.name, found)}\n" for arm, found in arms.items() if found)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
