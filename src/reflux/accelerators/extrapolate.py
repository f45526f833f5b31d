"""EffOPD: jump further along the student's latest displacement, as far as a few fixed prompts do not object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.accelerators.base import AcceleratorPart
from reflux.accelerators.score import Scoring
from reflux.papers import Paper
from reflux.parts import STRICT

if TYPE_CHECKING:
    from reflux.accelerators.extrapolate_engine import OpenExtrapolate
    from reflux.config import RunConfig
    from reflux.rundir import Run

INCLUDE = ("attn", "attention", "mlp", "ffn", ".ff", "feed_forward")  # what common architectures call these modules
Count = Annotated[int, Field(ge=1)]

EFFOPD = Paper("effopd", "Learning to Foresee: Unveiling the Unlocking Efficiency of On-Policy Distillation", "2605.11739", 2026)


@dataclass(frozen=True, config=STRICT)
class Extrapolate(AcceleratorPart):
    """After optimiser steps 1, 2, 4, 8, ... try W + m (W - anchor) for m = 2, 4, ..., 2 `tries`; stay at the last one that scored better.

    anchor: the weights the search before ended with, its jump included; at first, those the run began with. So the displacement W - anchor
    is training's alone. Candidates are made from W and the anchor in float32. The first one that is not accepted ends the search; none
    accepted: W gets its own bits back. Optimiser moments, schedule and step counter do not move. Low-rank adapters: their product's
    displacement is added to the frozen base (the factors stay), never A and B one by one.

    score: of W and of every candidate, on `prompts` prompts drawn once from the training prompts (listed in score_prompts.jsonl) with
    `samples` answers each. "accuracy": the mean verdict of the task's verifier. "minus_kl": minus the reverse KL to `teacher` on those
    answers, nats per token; no labels needed, and ours, not the paper's. All weights of one search meet the same dice.
    rescore_incumbent: each comparison has fresh dice, and the better one so far is scored again with them: a lucky score does not stay for
    the next comparison. Costs up to 2 `tries` scorings a search instead of `tries` + 1.

    Each search is a line of searches.jsonl. Memory: two float32 copies of the moved weights, on the CPU; the anchor is in every checkpoint.
    A score that is not finite rejects a candidate; of W itself it is an error. A displacement of zero: no search.

    arXiv 2605.11739. Its formula accepts >=, its released code >: on few prompts ties are common, so "better" (strict) is the default.
    Its displacement leaves open whether the earlier weights are those before or after that search's jump; as the code, we take after. The
    code chains factors 2, 2/3, 2/5, ...; that is the same points, with rounding piling up. The code moves by accident norms whose name
    holds "attention"; we move no norms, embeddings or head.
    """

    tries: Annotated[int, Field(ge=0)] = 5  # 0: never
    prompts: Count = 50  # fixed ones of the training split
    samples: Count = 1  # answers to each
    accept: Literal["better", "not_worse"] = "better"  # than the best so far; not_worse lets ties through
    rescore_incumbent: bool = False
    score: Literal["accuracy", "minus_kl"] = "accuracy"
    teacher: str = "main"  # of minus_kl
    max_tokens: Count | None = None  # of a scored answer; without it the sampler's max_tokens, never a cap of training
    include: tuple[str, ...] = INCLUDE  # parts of names that move; a name with "norm" only where the part has it too

    def __post_init__(self) -> None:
        if not self.include or not all(self.include):
            raise ValueError('include names the modules that move by parts of their names, for example ["attn", "mlp"]; none may be empty')

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (EFFOPD,)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.prompts, self.samples, self.score, self.teacher, self.max_tokens)

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[OpenExtrapolate]:
        from reflux.accelerators.extrapolate_engine import OpenExtrapolate

        yield OpenExtrapolate(self, run)


def fires(step: int) -> bool:
    """Is there a search after so many completed optimiser steps? At 1, 2, 4, 8, ...: the powers of two. ValueError below 0."""
    if step < 0:
        raise ValueError(f"completed steps are counted from 0, got {step}")
    return step > 0 and step & (step - 1) == 0


def multiples(tries: int = 5) -> list[int]:
    """How many displacements beyond the weights the candidates lie: 2, 4, ..., 2 `tries` (two times k, not two to the k).

    These are the running products of 1 + f_k minus 1, for the released code's factors f_1 = 2, f_(k+1) = f_k / (1 + f_k). ValueError
    below 0.
    """
    if tries < 0:
        raise ValueError(f"tries must be at least 0, got {tries}")
    return [2 * k for k in range(1, tries + 1)]


def moved(names: Iterable[str], include: Iterable[str]) -> list[str]:
    """The parameter names in which a part of `include` occurs. A name with "norm" counts only for a part that has "norm" itself."""
    parts = tuple(include)
    return [name for name in names if any(part in name and ("norm" in part or "norm" not in name) for part in parts)]
