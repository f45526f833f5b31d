"""EffOPD: move the weights further along their latest displacement, as long as the score on a few fixed
prompts improves.
"""

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
    """After optimiser steps 1, 2, 4, 8, ... search for better weights: score W + m (W - anchor) for m = 2, 4,
    6, ... (at most `tries` candidates) and keep the last accepted candidate.

    A candidate is accepted if it scores higher than the best weights so far, which at first are the weights W
    after the step. The first candidate that is not accepted ends the search. If none is accepted, W is
    restored bit for bit.

    anchor: the weights at the end of the previous search, its jump included; at first, the weights at the
    start of the run. The displacement W - anchor therefore contains training steps only. Candidates are
    computed from W and the anchor in float32. Optimiser moments, schedule and step counter do not change.
    With low-rank adapters, m times the displacement of the product B A is added to the frozen base weight,
    and A and B stay unchanged.

    score: W and every candidate are scored on `prompts` prompts, drawn once from the training prompts (listed
    in parts/extrapolation/score_prompts.jsonl), with `samples` answers each. "accuracy": the mean verdict of
    the task's verifier. "minus_kl": minus the reverse KL to `teacher` on those answers, in nats per token; it
    needs no labels and is not in the paper. All weights of one search use the same random numbers.
    rescore_incumbent: each comparison uses new random numbers, and the best weights so far are scored again
    with them, so that a lucky score does not carry over to the next comparison. This costs up to 2 * tries
    scorings per search instead of tries + 1.

    Each search is a line of searches.jsonl. Memory: two float32 copies, on the CPU, of the weights that the
    search changes (`include`). The anchor is in every checkpoint. A candidate whose score is not finite is
    rejected; a score of W that is not finite is an error. If the displacement is zero, there is no search.

    arXiv 2605.11739. The paper's formula accepts an equal score (>=), its released code does not (>). With
    few prompts equal scores are common, so the default is accept = "better", as in the code. The paper does
    not state whether the displacement starts from the weights before or after the previous search's jump;
    like the released code, this part uses the weights after it. The released code computes each candidate
    from the previous one, with the factors (2, 2/3, 2/5, ...). The candidates are the same, but rounding
    errors add up. The released code also moves norms whose name contains "attention", by accident; this part
    moves no norms, embeddings or head.
    """

    when: ClassVar[str] = (
        "The teacher's direction shows early and steps are dear. After steps 1, 2, 4, 8, ... the run tries "
        "to jump ahead; "
        "searches are in `searches.jsonl` and in the report. Scoring costs tokens: compare runs by FLOP too, "
        "and with a larger "
        "learning rate. Without labels: `extrapolation.score=minus_kl`."
    )

    # Candidates of one search at most; 0: no search.
    tries: Annotated[int, Field(ge=0)] = 5
    # Number of fixed prompts of the training split.
    prompts: Count = 50
    # Answers to each prompt.
    samples: Count = 1
    # "better": a candidate must score higher than the best so far; "not_worse": an equal score is accepted
    # too.
    accept: Literal["better", "not_worse"] = "better"
    # True: each comparison uses new random numbers.
    rescore_incumbent: bool = False
    # The quantity that is compared.
    score: Literal["accuracy", "minus_kl"] = "accuracy"
    # The teacher of "minus_kl".
    teacher: str = "main"
    # Limit of a scored answer in tokens; None: the sampler's max_tokens, never the cap of training.
    max_tokens: Count | None = None
    # Parts of the names of parameters that move. A name with "norm" matches only a part with "norm".
    include: tuple[str, ...] = INCLUDE

    def __post_init__(self) -> None:
        if not self.include or not all(self.include):
            raise ValueError(
                'include lists parts of the names of the modules that move, for example ["attn", "mlp"]; the '
                "list and its entries must not be empty"
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
                    f'{where}.score = "accuracy" compares weights by the task\'s verdicts, but its grader '
                    '"none" gives none. '
                    f'{JUDGED}, or use score = "minus_kl".'
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
                f'{where}.score = "minus_kl" computes the KL of random denoising steps, but '
                f"{sampler}.noise_level = 0 makes them deterministic and the KL infinite. "
                'Use a noise_level above 0, such as 0.7, or score = "accuracy".'
            )

    def _asked(self, where: str, table: str, teacher: Teacher) -> Iterator[str]:
        """Refusals for a teacher that cannot score candidates."""
        if teacher.follows:
            yield (
                f'{where}.score = "minus_kl" compares candidates with teachers.{table}, which follows the '
                'student. Name a teacher that does not change, or use score = "accuracy".'
            )
        if teacher.context.min_group > self.samples:
            yield (
                f'{where}.score = "minus_kl" gives teachers.{table} {self.samples} answer(s) per prompt, '
                "but its context "
                f"needs {teacher.context.min_group}. Raise {where}.samples."
            )
        if teacher.context.requirements.reward:
            yield (
                f'{where}.score = "minus_kl" gives teachers.{table} answers without verdicts, but its '
                'context needs their verdicts. Use score = "accuracy", or name another teacher.'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not self.tries:
            yield f"{where}.tries = 0: extrapolation makes no search and never moves the weights."

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.prompts, self.samples, self.score, self.teacher, self.max_tokens)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenExtrapolate]:
        from reflux.extrapolation.extrapolate_engine import OpenExtrapolate

        yield OpenExtrapolate(self, context, services)


def fires(step: int) -> bool:
    """True if `extrapolate` searches for better weights after `step` completed optimiser steps: if `step` is
    a power of two (1, 2, 4, 8, ...). ValueError for a negative number.
    """
    if step < 0:
        raise ValueError(f"the number of completed steps must be at least 0, got {step}")
    return step > 0 and step & (step - 1) == 0


def multiples(tries: int = 5) -> list[int]:
    """The multiples m of the displacement that give the candidates: 2, 4, ..., 2 `tries` (two times k, not
    two to the power k).

    These are the running products of 1 + f_k minus 1, for the released code's factors f_1 = 2, f_(k+1) = f_k
    / (1 + f_k). ValueError below 0.
    """
    if tries < 0:
        raise ValueError(f"tries must be at least 0, got {tries}")
    return [2 * k for k in range(1, tries + 1)]
