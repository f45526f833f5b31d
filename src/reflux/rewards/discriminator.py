"""A discriminator that learns to tell the teacher's answers from the student's, as the reward (GAD)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.schedules import Number, at, first_below, number
from reflux.models.folders import look_for_text
from reflux.models.placement import Device
from reflux.models.settings import Decay, Positive
from reflux.rewards.base import RewardPart, weightless
from reflux.types import TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded
    from reflux.runtime.services import Services

GAD = Paper(
    "gad",
    "Black-Box On-Policy Distillation of Large Language Models",
    "2511.10643",
    2025,
    "Ye, Tianzhu and Dong, Li and Chi, Zewen and Wu, Xun and Huang, Shaohan and Wei, Furu",
)
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class DiscriminatorReward(RewardPart):
    """The score D(x, y) of a discriminator that is trained during the run to tell the teacher's answers to a
    prompt x from the student's. arXiv 2511.10643 (GAD).

    D is a language model with one linear output w in place of its head: D(x, y) = w . h, where h [H] is the
    hidden state at the last token of prompt and answer. It begins with the weights of `model` and w = 0. The
    teacher's answers y_t are the `references` of the prompts. Once per step D learns from the attempts y_s of
    that step, by one step of AdamW on the Bradley-Terry loss, the mean of -log sigmoid(D(x, y_t) - D(x, y_s))
    over all pairs of a teacher's answer and an attempt at the same prompt. Attempts without a verdict are in
    no pair.

    An attempt is scored by D as it is at that moment; with max_staleness = 0 this is before D learns from it.
    All attempts of a group are scored by the same D. The score has no unit and no fixed scale, so use
    `credit.group_advantage.normalise_std`. A teacher's answer is cut where an attempt would be cut.

    The weights of D and its moments are in the checkpoints. D takes the memory of a second student that is
    trained. metrics.jsonl has under `rewards.NAME`, before each update: `loss` (log 2 = 0.69 if D knows
    nothing), `pair_accuracy` (the share of pairs in which the teacher's answer has the higher score; equal
    scores count half), the mean `teacher_score` and `student_score`, `grad_norm`, `lr` and `pairs`.
    """

    learns: ClassVar[bool] = True

    # the model that D begins with; not set: the learner's. It must have the student's tokens.
    model: str | None = None
    # the learning rate of D
    lr: Number = 1e-6
    # the decays of Adam's averages
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    # D's gradient is clipped to this norm
    clip: Positive = 0.2
    # in so many steps only D learns: attempts that are asked for in them have no reward
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    # the number of teacher's answers to each prompt
    references: Count = 1
    # tokens in one micro-batch of D, padding included; the gradient does not depend on it
    micro_batch_tokens: Count = 16384
    # True: activations are computed again in D's backward pass
    gradient_checkpointing: bool = False
    # "auto": bfloat16 on a GPU
    autocast: Literal["auto", "off"] = "auto"
    # of D; "auto": the first GPU, else the CPU
    device: Device = "auto"
    # the factor of this reward's values in the sum of several rewards
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def __post_init__(self) -> None:
        number(self.lr, "lr")

    @property
    def references_needed(self) -> int:
        return self.references

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.task.rollouts is not TokenRollout:
            yield f"{where} judges texts, and the attempts of this task are images. Use rewards.verifier."
        if cfg.task.multi_turn:
            yield (
                f"{where} compares with answers in one turn, and the task '{kind_of('tasks', cfg.task)}' has "
                "several turns. Use rewards.verifier or rewards.environment."
            )
        if not cfg.sampler.on_policy:
            yield (
                f"{where} compares the student's own answers with the teacher's, and the sampler "
                f"'{kind_of('samplers', cfg.sampler)}' gives answers that the student did not write. Use "
                'sampler.kind = "hf".'
            )
        if cfg.cluster is not None or cfg.learner.divides:
            yield (
                f"{where} trains its discriminator in one process, and was not tried with parts in other "
                'processes. Use learner.kind = "hf" without a [cluster] table.'
            )
        if (step := first_below(self.lr, 0, cfg.steps)) is not None:
            yield (
                f"{where}.lr is {at(self.lr, step):g} at step {step}: the discriminator would learn to take "
                "the student's answers for the teacher's. Keep it at 0 or more."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.warmup_steps >= cfg.steps:
            yield (
                f"{where}.warmup_steps = {self.warmup_steps} of {cfg.steps} steps: only the discriminator "
                "learns in this run."
            )
        yield from weightless(where, self.weight)

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (GAD,)

    def inputs(self, where: str) -> None:
        if self.model is not None:
            look_for_text(self.model, f"{where}.model", None)

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        """The pair accuracy, the loss and the mean scores by step."""
        from reflux.reports.chart import step_chart

        found = recorded.metrics("rewards", name)
        for title, keys, unit, caption in CHARTS:
            lines = {key: found[key] for key in keys if key in found}
            if lines:
                yield step_chart(f"rewards.{name}: {title}", unit, lines, caption)

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.rewards.discriminator_engine import OpenDiscriminator

        return OpenDiscriminator.opened(self, context, services)


# title, keys of metrics.jsonl, unit and caption of each chart
CHARTS = (
    (
        "pairs",
        ("pair_accuracy", "loss"),
        "share of pairs; nats",
        "Before each update. An accuracy that stays at 0.5 means that the discriminator has not learnt, or "
        "that the answers cannot be told apart. One that stays at 1.0 means that it tells all of them, by "
        "whatever differs: look at lengths, cut answers and formatting first.",
    ),
    (
        "scores",
        ("teacher_score", "student_score"),
        "mean score",
        "Before each update. Scores have no unit. Only differences of scores at one prompt have a meaning.",
    ),
)
