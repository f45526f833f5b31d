"""Prefix Teach, Suffix Fade: each attempt is distilled up to where the teacher stops telling the student's
own candidates apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.credit.change_point import (
    Split,
    best_split,
    candidate_margin,
    change_point,
    segment_margins,
    segment_scores,
)
from reflux.credit.segments import Way, segments_of
from reflux.metrics.values import Max, Quantiles
from reflux.teachers.names import tables_of, unless_known
from reflux.types import Attempt, Credit, Group, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded

__all__ = ["Release", "candidate_margin", "change_point", "segment_scores"]

RELEASE = Paper(
    "release",
    "Prefix Teach, Suffix Fade: Local Teachability Collapse in Strong-to-Weak On-Policy Distillation",
    "2605.13643",
    2026,
)


@dataclass(frozen=True, config=STRICT)
class Release(CreditPart):
    """Factor 0 on what follows the one downward step of an attempt's segment scores, if it has one; what is
    kept is scaled up in its place.

    Per chosen position the margin is the gap between the teacher's best two of the student's `k` likeliest
    tokens (nats); per segment the score is log(1 + mean margin); the step is found by BIC (see
    `change_point`). Kept: factor sum(mask) / sum(mask of the kept segments) with `rescale`, so that an
    attempt weighs what its full length would have weighed, else 1; released: 0. No step, or a gain of at most
    `min_gain`: 1 everywhere. The scale looks at mask_T alone, whatever other rules say, so their order is
    free; under the denominator `kept` it would count twice. Nothing is sampled less: the finished answer is
    read. Positions the student did not choose keep factor 1.

    `candidates`: as the student stood when it acted ("said"), or as it stands ("now", for late attempts).
    `segments`: "sentences", "lines", "steps" (one arithmetic step each), or blocks of so many tokens, where
    answers are short. An attempt that the teacher did not score has factor 1 and no notes. Neutral:
    `min_segments` above any number of segments. For attempts made of tokens only.

    Notes, over scored attempts: `released` (share), `segments` (mean number), `segment_tokens` and
    `segment_tokens_max` (median and largest length); over released ones: `kept` (median share of the chosen
    positions) and `gain` (mean of BIC_0 - BIC_1). arXiv 2605.13643, no official code. The paper has k = 4 and
    sentences, and does not state: minimum sizes, the scope of the scale's sums (here one attempt), what
    happens without a step (here plain distillation); `min_gain` 0 is the rule as written, its counts use 6.
    """

    when: ClassVar[str] = (
        "Answers are long and the teacher is much the stronger. Late tokens are released where it no longer "
        "tells the student's "
        "candidates apart; the metrics say how often. With text of sentences (`base=hub`) set "
        "`credit.release.segments=sentences`."
    )

    # candidates: the student's likeliest tokens
    k: Annotated[int, Field(ge=2)] = 4
    # an attempt with fewer is never released
    min_segments: Annotated[int, Field(ge=1)] = 8
    # segments on either side of the step, at least
    min_side: Annotated[int, Field(ge=1)] = 3
    # of BIC, to be exceeded
    min_gain: float = 0.0
    # or "lines", "steps", or a number of tokens
    segments: Way | Annotated[int, Field(ge=1, strict=True)] = "sentences"
    rescale: bool = True
    candidates: Literal["behaviour", "now"] = "behaviour"
    teacher: str = "main"

    shifts = False
    min_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.min_gain):
            raise ValueError(
                f"min_gain must be finite, got {self.min_gain}; to release nothing, raise min_segments"
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (RELEASE,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.rescale and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f"{where}: rescale gives every attempt the mass of its full length, and loss_aggregation = "
                '"token-mean-weighted" divides by the kept positions: '
                'the release would count twice. Use loss_aggregation = "token-mean" or '
                f'"seq-mean-token-mean", or {where}.rescale = false.'
            )
        yield from unless_known(cfg, f"{where}.teacher", self.teacher)
        for table in tables_of(cfg, self.teacher):
            if not cfg.teachers[table].at_ids:
                yield (
                    f"{where} needs the teacher's log-probs at the student's {self.k} likeliest tokens, but "
                    f"teachers.{table} answers with "
                    "a list of its own: a token missing from it has an unknown probability, not a low one. "
                    "Use a teacher that answers at "
                    f"given ids, such as a local one."
                )
        if self.candidates == "behaviour" and not cfg.sampler.on_policy:
            yield (
                f"{where} looks at the tokens the student was about to choose, and this sampler "
                f"('{kind_of('samplers', cfg.sampler)}') "
                f"gives answers it did not write. Use candidates = \"now\", or sampler 'hf'."
            )

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        from reflux.reports.release_charts import release_chart

        return (release_chart(name, recorded.rows("attempts")),)

    @property
    def requirements(self) -> Requirements:
        spans = not isinstance(self.segments, int)
        if self.candidates == "behaviour":
            return Requirements(behaviour=self.k, candidates=self.k, spans=spans)
        return Requirements(now_topk=self.k, now_candidates=self.k, spans=spans)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt) for attempt in group]

    def _share(self, attempt: Attempt) -> Credit:
        rollout = attempt.rollout
        if attempt.target(self.teacher) is None or rollout.finish == "error" or not rollout.mask_T.any():
            return Credit()
        if not isinstance(rollout, TokenRollout):
            raise ValueError(
                "release reads sentences of tokens; a flow rollout has none. Take this rule away."
            )
        margin_T = np.zeros(rollout.length)
        margin_T[rollout.mask_T] = candidate_margin(self._listed(attempt)[rollout.mask_T])
        segments = segments_of(rollout, self.segments)
        margins = segment_margins(margin_T, segments)
        split = best_split([math.log1p(margin) for margin in margins], self.min_segments, self.min_side)
        released = split is not None and split.gain > self.min_gain
        lengths = [segment.stop - segment.start for segment in segments]
        return Credit(
            weight_T=self._factor(rollout.mask_T, segments[split.kept].start)
            if split is not None and released
            else 1.0,
            notes={
                "released": float(released),
                "segments": float(len(segments)),
                "segment_tokens": Quantiles(tuple(map(float, lengths))),
                "segment_tokens_max": Max(float(max(lengths))),
                **(_gained(split, lengths) if split is not None and released else {}),
            },
            detail=_detail(segments, margins, split, released),
        )

    def _factor(self, mask_T: np.ndarray, end: int) -> np.ndarray:
        """On chosen positions: 1 before `end`, or more where the mass is kept, and 0 from there on. Elsewhere
        1.
        """
        scale = mask_T.sum() / mask_T[:end].sum() if self.rescale else 1.0
        weight_T = np.where(mask_T, scale, 1.0).astype(np.float32)
        weight_T[end:][mask_T[end:]] = 0.0
        return weight_T

    def _listed(self, attempt: Attempt) -> np.ndarray:
        """The teacher's log-probs at the student's k likeliest tokens, [T, k]. Lists may be longer, where
        another part wants more.
        """
        answer, prompt = attempt.answers.get(self.teacher), attempt.rollout.prompt.id
        listed = (
            None
            if answer is None
            else answer.candidates
            if self.candidates == "behaviour"
            else answer.now_candidates
        )
        if listed is not None:
            return listed.logp_TK[:, : self.k]
        if self.candidates == "now" and not isinstance(attempt.now, TopKTarget):
            raise ValueError(
                f'release with candidates = "now" needs the student\'s list of now for prompt {prompt}, and '
                "the learner gave none. Use "
                f'candidates = "behaviour".'
            )
        raise ValueError(
            f"release needs what teacher '{self.teacher}' gives the student's {self.k} likeliest tokens, but "
            f"prompt {prompt} came with its "
            f"target alone. Use a teacher that answers at given ids, such as 'local'."
        )


def _gained(split: Split, lengths: list[int]) -> dict[str, Any]:
    return {"kept": Quantiles((sum(lengths[: split.kept]) / sum(lengths),)), "gain": split.gain}


def _detail(
    segments: list[slice], margins: list[float], split: Split | None, released: bool
) -> dict[str, Any]:
    """What the report draws: where each segment starts, its mean margin (nats; the score is log(1 + it)), how
    many are kept.
    """
    return {
        "starts": [segment.start for segment in segments],
        "margins": [round(margin, 4) for margin in margins],
        "kept": split.kept if split is not None and released else len(segments),
        "gain": None if split is None else round(split.gain, 4),
    }
