"""EffOPD: jump further along the student's latest displacement, as far as a few fixed prompts do not object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import EFFOPD, Paper
from reflux.config.registry import STRICT
from reflux.extrapolation.base import ExtrapolationPart, Scoring
from reflux.learners.access import INCLUDE
from reflux.tasks.base import JUDGED
from reflux.teachers.names import tables_of, unless_known
from reflux.types import FlowRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.extrapolation.extrapolate_engine import OpenExtrapolate
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded
    from reflux.runtime.services import Services
    from reflux.teachers.base import Teacher

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Extrapolate(ExtrapolationPart):
    """After optimiser steps 1, 2, 4, 8, ... try W + m (W - anchor) for m = 2, 4, ..., 2 `tries`; stay at the
    last one that scored better.

    anchor: the weights the search before ended with, its jump included; at first, those the run began with.
    So the displacement W - anchor is training's alone. Candidates are made from W and the anchor in float32.
    The first one that is not accepted ends the search; none accepted: W gets its own bits back. Optimiser
    moments, schedule and step counter do not move. Low-rank adapters: their product's displacement is added
    to the frozen base (the factors stay), never A and B one by one.

    score: of W and of every candidate, on `prompts` prompts drawn once from the training prompts (listed in
    parts/extrapolation/score_prompts.jsonl) with `samples` answers each. "accuracy": the mean verdict of the
    task's verifier. "minus_kl": minus the reverse KL to `teacher` on those answers, nats per token; no labels
    needed, and ours, not the paper's. All weights of one search meet the same random numbers.
    rescore_incumbent: each comparison has fresh random numbers, and the better one so far is scored again
    with them: a lucky score does not stay for the next comparison. Costs up to 2 `tries` scorings a search
    instead of `tries` + 1.

    Each search is a line of searches.jsonl. Memory: two float32 copies of the moved weights, on the CPU; the
    anchor is in every checkpoint. A score that is not finite rejects a candidate; of W itself it is an error.
    A displacement of zero: no search.

    arXiv 2605.11739. Its formula accepts >=, its released code >: on few prompts ties are common, so "better"
    (strict) is the default. Its displacement leaves open whether the earlier weights are those before or
    after that search's jump; as the code, we take after. The code chains factors 2, 2/3, 2/5, ...; that is
    the same points, with rounding piling up. The code moves by accident norms whose name holds "attention";
    we move no norms, embeddings or head.
    """

    when: ClassVar[str] = (
        "The teacher's direction shows early and steps are dear. After steps 1, 2, 4, 8, ... the run tries "
        "to jump ahead; "
        "searches are in `searches.jsonl` and in the report. Scoring costs tokens: compare runs by FLOP too, "
        "and with a larger "
        "learning rate. Without labels: `extrapolation.score=minus_kl`."
    )

    # 0: never
    tries: Annotated[int, Field(ge=0)] = 5
    # fixed ones of the training split
    prompts: Count = 50
    # answers to each
    samples: Count = 1
    # than the best so far; not_worse lets ties through
    accept: Literal["better", "not_worse"] = "better"
    rescore_incumbent: bool = False
    score: Literal["accuracy", "minus_kl"] = "accuracy"
    # of minus_kl
    teacher: str = "main"
    # of a scored answer; without it the sampler's max_tokens, never a cap of training
    max_tokens: Count | None = None
    # parts of names that move; a name with "norm" only where the part has it too
    include: tuple[str, ...] = INCLUDE

    def __post_init__(self) -> None:
        if not self.include or not all(self.include):
            raise ValueError(
                'include names the modules that move by parts of their names, for example ["attn", "mlp"]; '
                "none may be empty"
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (EFFOPD,)

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        from reflux.reports.searches import read_searches, search_charts

        return search_charts(read_searches(recorded.rows("searches")))

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.score == "accuracy":
            if not cfg.task.judges:
                yield (
                    f'{where}.score = "accuracy" compares weights by the task\'s verdicts, and with its '
                    'grader "none" nothing is ever '
                    f'judged. {JUDGED}, or use score = "minus_kl".'
                )
            return
        yield from unless_known(cfg, f"{where}.teacher", self.teacher)
        for table in tables_of(cfg, self.teacher):
            yield from self._asked(where, table, cfg.teachers[table])
        if (
            cfg.task.rollouts is FlowRollout
            and cfg.sampler.generation.grids
            and not cfg.sampler.generation.noise_level
        ):
            sampler = "sampler" if cfg.sampler.on_policy else "sampler.generate"
            yield (
                f'{where}.score = "minus_kl" takes the KL of steps that were drawn, and '
                f"{sampler}.noise_level = 0 draws none: it is "
                f'infinite. Use a noise_level above 0, such as 0.7, or score = "accuracy".'
            )

    def _asked(self, where: str, table: str, teacher: Teacher) -> Iterator[str]:
        """What a teacher that scores candidates must not need."""
        if teacher.follows:
            yield (
                f'{where}.score = "minus_kl" compares candidates with teachers.{table}, which follows the '
                "student. Name a teacher that "
                f'stays, or use score = "accuracy".'
            )
        if teacher.context.min_group > self.samples:
            yield (
                f'{where}.score = "minus_kl" asks teachers.{table} about {self.samples} answer(s) to a '
                "prompt, and its context "
                f"needs {teacher.context.min_group}. Raise {where}.samples."
            )
        if teacher.context.requirements.reward:
            yield (
                f'{where}.score = "minus_kl" asks teachers.{table} about answers without verdicts, and its '
                "context sorts attempts by "
                f'their verdicts. Use score = "accuracy", or name another teacher.'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not self.tries:
            yield f"{where}.tries = 0: it never jumps."

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.prompts, self.samples, self.score, self.teacher, self.max_tokens)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenExtrapolate]:
        from reflux.extrapolation.extrapolate_engine import OpenExtrapolate

        yield OpenExtrapolate(self, context, services)


def fires(step: int) -> bool:
    """Is there a search after so many completed optimiser steps? At 1, 2, 4, 8, ...: the powers of two.
    ValueError below 0.
    """
    if step < 0:
        raise ValueError(f"completed steps are counted from 0, got {step}")
    return step > 0 and step & (step - 1) == 0


def multiples(tries: int = 5) -> list[int]:
    """How many displacements beyond the weights the candidates lie: 2, 4, ..., 2 `tries` (two times k, not
    two to the k).

    These are the running products of 1 + f_k minus 1, for the released code's factors f_1 = 2, f_(k+1) = f_k
    / (1 + f_k). ValueError below 0.
    """
    if tries < 0:
        raise ValueError(f"tries must be at least 0, got {tries}")
    return [2 * k for k in range(1, tries + 1)]
