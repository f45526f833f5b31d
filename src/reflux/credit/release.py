"""Prefix Teach, Suffix Fade: each attempt is distilled up to the position from which the teacher no longer
distinguishes the student's candidates.
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
    """Weight 0 after the downward step in the segment scores of an attempt, if there is one.

    The margin of a chosen position is the difference, in nats, between the two best log-probs that the
    teacher gives to the student's `k` most likely tokens. The score of a segment is log(1 + mean margin). The
    step is found by BIC (see `change_point`). Positions after the step are released and have weight 0.
    Positions before the step are kept and have weight 1. With `rescale` kept positions have weight sum(mask)
    / sum(mask of the kept segments), so the attempt weighs as much as its full length would. Without a step,
    or with a gain of at most `min_gain`, the weight is 1 everywhere. The scale depends on mask_T alone and
    not on other rules, so the order of the rules does not matter. With loss_aggregation "token-mean-weighted"
    the scale would count twice. The rule reads the finished answer, so no sampling is saved. Positions that
    the student did not choose keep weight 1.

    `candidates`: the most likely tokens of the policy that sampled ("behaviour") or of the current student
    ("now", for stale attempts). `segments`: "sentences", "lines", "steps" (one arithmetic step each), or a
    number of tokens per block, for short answers. An attempt that the teacher did not score has weight 1 and
    no notes. Neutral: `min_segments` above any number of segments. Only for attempts made of tokens.

    Notes over scored attempts: `released` (share), `segments` (mean number), `segment_tokens` and
    `segment_tokens_max` (median and largest length). Notes over released attempts: `kept` (median share of
    the chosen positions) and `gain` (mean of BIC_0 - BIC_1). arXiv 2605.13643, no official code. The paper
    uses k = 4 and sentences. It does not state the minimum sizes, the scope of the sums in the scale (here
    one attempt), or the case without a step (here plain distillation). `min_gain` 0 is the rule as written;
    the counts in the paper use 6.
    """

    when: ClassVar[str] = (
        "Answers are long and the teacher is much stronger than the student. Late tokens are released where "
        "the teacher no longer distinguishes the student's candidates; the metrics give the share of "
        "released attempts. For text in sentences (`base=hub`) set `credit.release.segments=sentences`."
    )

    # number of candidates per position: the student's k most likely tokens
    k: Annotated[int, Field(ge=2)] = 4
    # an attempt with fewer segments is never released
    min_segments: Annotated[int, Field(ge=1)] = 8
    # minimum number of segments before the step, and after it
    min_side: Annotated[int, Field(ge=1)] = 3
    # the gain BIC_0 - BIC_1 must be larger than this
    min_gain: float = 0.0
    # how an answer is cut: "sentences", "lines", "steps", or a number of tokens per segment
    segments: Way | Annotated[int, Field(ge=1, strict=True)] = "sentences"
    rescale: bool = True
    candidates: Literal["behaviour", "now"] = "behaviour"
    teacher: str = "main"

    gives_offsets = False
    min_group = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.min_gain):
            raise ValueError(
                f"min_gain must be finite, got {self.min_gain}. To release nothing, raise min_segments"
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (RELEASE,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.rescale and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f"{where}: rescale gives every attempt the weight of its full length, and loss_aggregation "
                '= "token-mean-weighted" divides by the number of positions with non-zero weight, so the '
                'release would count twice. Use loss_aggregation = "token-mean" or '
                f'"seq-mean-token-mean", or {where}.rescale = false.'
            )
        yield from unless_known(cfg, f"{where}.teacher", self.teacher)
        for table in tables_of(cfg, self.teacher):
            if not cfg.teachers[table].at_ids:
                yield (
                    f"{where} needs the teacher's log-probs at the student's {self.k} most likely tokens, "
                    f"but teachers.{table} gives a list of its own most likely tokens, and the probability "
                    "of a token outside that list is unknown. Use a teacher that gives log-probs at given "
                    f"ids, such as a local one."
                )
        if self.candidates == "behaviour" and not cfg.sampler.on_policy:
            yield (
                f"{where} needs the student's most likely tokens at sampling time, and this sampler "
                f"('{kind_of('samplers', cfg.sampler)}') gives answers that the student did not write. Use "
                f"candidates = \"now\", or sampler 'hf'."
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
                "release needs attempts made of tokens, and a flow rollout has none. Remove this rule."
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
        """Weights, [T]: on chosen positions 1 before `end` (more with `rescale`) and 0 from `end` on; on
        other positions 1.
        """
        scale = mask_T.sum() / mask_T[:end].sum() if self.rescale else 1.0
        weight_T = np.where(mask_T, scale, 1.0).astype(np.float32)
        weight_T[end:][mask_T[end:]] = 0.0
        return weight_T

    def _listed(self, attempt: Attempt) -> np.ndarray:
        """The teacher's log-probs at the student's k most likely tokens, [T, k]. Lists that are longer
        because another part requires more are cut to k.
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
                f'release with candidates = "now" needs the list of the current student for prompt {prompt}, '
                f'and the learner gave none. Use candidates = "behaviour".'
            )
        raise ValueError(
            f"release needs the log-probs of teacher '{self.teacher}' at the student's {self.k} most likely "
            f"tokens, but prompt {prompt} has only its target. Use a teacher that gives log-probs at given "
            f"ids, such as 'local'."
        )


def _gained(split: Split, lengths: list[int]) -> dict[str, Any]:
    return {"kept": Quantiles((sum(lengths[: split.kept]) / sum(lengths),)), "gain": split.gain}


def _detail(
    segments: list[slice], margins: list[float], split: Split | None, released: bool
) -> dict[str, Any]:
    """The values that the report draws: the start of each segment, its mean margin in nats (the score is
    log(1 + margin)), the number of kept segments, and the gain.
    """
    return {
        "starts": [segment.start for segment in segments],
        "margins": [round(margin, 4) for margin in margins],
        "kept": split.kept if split is not None and released else len(segments),
        "gain": None if split is None else round(split.gain, 4),
    }
