"""The nouns: what passes between the parts of the loop.

Dimension key, used as suffixes everywhere: P prompts per step  G attempts per prompt  T positions of one
attempt  S = T + 1 states of a flow  N packed positions of a batch
K top-k             V vocabulary           H hidden size               D flattened latent

Log-probs are natural logs (nats). Costs are divergences(student, teacher); an advantage is a negative cost.
What is kept per attempt lives in numpy arrays on the host; only hidden states are torch tensors (numpy has no
bfloat16).

One worked example: the prompt "2+3?" answered "5<end>" by one token each. T = 2, tokens_T = [21, 1], mask_T =
[True, True] (the sampled end token is a choice like any other), logp_T = [-0.1, -0.02], finish = "stop".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from reflux.loss.targets import HiddenTarget, SampledTarget, StepRecord, TopKTarget, VelocityTarget

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, and where tools are called also
# "tool_calls" or "tool_call_id".
Message = dict[str, Any]
# "error": nothing was sampled. The last three come from an environment: its attempt is kept as far as it
# went.
Finish = Literal["stop", "length", "error", "max_turns", "tool_error", "timeout"]
# What is no fault of the student gets no verdict. Its choices are real and keep their weight; an "error" has
# none.
UNJUDGED: tuple[Finish, ...] = ("error", "tool_error", "timeout")
Target = SampledTarget | TopKTarget | HiddenTarget | VelocityTarget


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `id` is stable across epochs: seeding, resume and reports refer to it."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    # answers written by a teacher or a person, for the `references` sampler
    references: tuple[str, ...] = ()
    # which teacher table answers, where several share a name
    route: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt as it was acted out, before anyone judged it. T positions, of which mask_T says where the
    student chose.
    """

    # what a position is called
    unit: ClassVar[str] = "positions"

    prompt: Prompt
    # index in its group
    sample: int
    # policy version of its first turn
    version: int
    finish: Finish
    # bool
    mask_T: np.ndarray
    # float32, nats, under the distribution sampled from; 0 where the student did not choose
    logp_T: np.ndarray
    # at temperature 1 without top-p, where that differs
    logp_raw_T: np.ndarray | None = None
    behaviour: TopKTarget | SampledTarget | VelocityTarget | None = None
    # that the student ran forward to make it; None: the prompt and every position once
    sampled_positions: int | None = None
    # that teachers ran forward to draw it, by their table
    drawn_positions: Mapping[str, int] = field(default_factory=dict)

    @property
    def positions_acted(self) -> int:
        """Positions that the student ran forward to make this, prompts included; of an attempt that ended in
        an error, none by default.
        """
        if self.sampled_positions is not None:
            return self.sampled_positions
        return 0 if self.finish == "error" else self.prompt_length + self.length

    @property
    def length(self) -> int:
        return len(self.mask_T)

    @property
    def policy_logp_T(self) -> np.ndarray:
        """Log-probs of what was chosen under the policy itself, at temperature 1 without top-p; nats.

        These are what a divergence from a teacher and a comparison with the student of now are about. An
        importance ratio divides by `logp_T` instead, the distribution that was sampled from.
        """
        return self.logp_T if self.logp_raw_T is None else self.logp_raw_T

    @property
    def prompt_length(self) -> int:
        """Positions a model reads before the first one, for FLOP accounting."""
        return 0

    @property
    def made(self) -> Any:
        """What a verifier is shown, and a person."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of what was made")

    def computed(self, rows_N: np.ndarray) -> int:
        """Positions a learner runs forward and backward to reach the positions `rows_N` (rising)."""
        return len(rows_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRollout(Rollout):
    """A text attempt. Position t is predicted by the state after prompt_tokens + tokens_T[:t]; nothing is
    ever tokenised again.
    """

    unit: ClassVar[str] = "tokens"

    # int64
    prompt_tokens: np.ndarray
    # int64; response positions, the sampled end token included, tool and user text masked out
    tokens_T: np.ndarray
    # what the student wrote, decoded without special tokens; several turns one line apart
    text: str
    # the whole conversation, the student's turns included
    messages: tuple[Message, ...]
    # int64, where wanted: characters [start, end) of `text` that each token wrote; start = end for none
    spans_T2: np.ndarray | None = None
    # the sum of what the environment gave its turns; None where it gave nothing
    environment_reward: float | None = None
    # bool, where wanted: True at special tokens that do not end a turn
    special_T: np.ndarray | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_tokens)

    @property
    def made(self) -> str:
        return self.text

    def computed(self, rows_N: np.ndarray) -> int:
        """All up to the last one: a token is predicted from those before it."""
        return int(rows_N[-1]) + 1 if len(rows_N) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRollout(Rollout):
    """An image drawn by a flow: S = T + 1 states along times t_S (1 noise, 0 data). The last step of a whole
    grid is masked out.
    """

    unit: ClassVar[str] = "steps"

    # float32; D = 0 where no latent value was kept, and then no position counts
    x_SD: np.ndarray
    # float32, falling
    t_S: np.ndarray
    # 0: no step was drawn, each is its mean
    noise_level: float
    guidance: float
    # uint8, [height, width] or [height, width, 3]: the last state as an image
    image: np.ndarray

    @property
    def made(self) -> np.ndarray:
        return self.image


@dataclass(frozen=True, slots=True)
class Reward:
    """What was found of one attempt: by a task, by a reward, in the record. value None: not judged, which is
    not the same as wrong.

    parts: numbers beside the value, by name, unweighted. feedback: words on the attempt, for contexts that
    show them. error: why there is no value, in a sentence (no time left, the verifier failed, sampling ended
    in an error); None where there is one.
    """

    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    feedback: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, verdict: float | Reward) -> Reward:
        return verdict if isinstance(verdict, Reward) else cls(float(verdict))


@dataclass(frozen=True, slots=True)
class Credit:
    """One credit rule's word on one attempt. A scalar or an array [T]; notes are merged into the metrics
    under the rule's name.
    """

    # multiplies the weight; finite and >= 0
    weight_T: np.ndarray | float = 1.0
    # nats added to the advantage
    advantage_offset_T: np.ndarray | float = 0.0
    # a plain number is averaged over the attempts that have it; or a `metrics.Metric`
    notes: dict[str, Any] = field(default_factory=dict)
    # plain JSON values, written beside the attempt and never averaged
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswer:
    """What one teacher answered when it was asked about one attempt. A teacher gives the first five fields,
    who asked adds the others.

    A teacher that could not answer has no target, and says why in one sentence: it is counted in the metrics,
    and asked again.
    """

    target: Target | None = None
    # its log-probs at the ids of `rollout.said`, where that is required
    candidates: TopKTarget | None = None
    # the student's and those before them, over all times it was asked; for FLOP accounting
    positions_read: int = 0
    # of the call, or of a batched call an equal part
    seconds: float = 0.0
    error: str | None = None
    # that was asked: several may share a name
    table: str = ""
    # of the view it was asked in: in another one it is asked again
    context_hash: str = ""
    # `View.notes`: what the context showed, in numbers
    context_notes: dict[str, float] = field(default_factory=dict)
    # what it answered before it was asked again; freshness compares the two
    previous: Target | None = None
    # its log-probs at the student's likeliest tokens of now, where that is required
    now_candidates: TopKTarget | None = None


@dataclass(slots=True)
class Attempt:
    """Everything known of one attempt, on one object. An absent target means: that teacher was not asked, or
    stayed silent.
    """

    rollout: Rollout
    reward: Reward | None = None
    # by teacher name, in the order of names
    answers: dict[str, TeacherAnswer] = field(default_factory=dict)
    # what the student would say now, along these tokens
    now: Target | None = None
    # what the step computed along it; None before the step, and where nothing was trained on
    learned: StepRecord | None = None
    credits: dict[str, Credit] = field(default_factory=dict)

    def target(self, teacher: str) -> Target | None:
        """What `teacher` said about this attempt; "said" is the student as it acted."""
        if teacher == "behaviour":
            return self.rollout.behaviour
        answer = self.answers.get(teacher)
        return None if answer is None else answer.target

    @property
    def verdict(self) -> float | None:
        """The reward's value. None where it was not judged (also by a number that is not finite), or ended in
        an error.
        """
        value = None if self.reward is None or self.rollout.finish in UNJUDGED else self.reward.value
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def weight_T(self) -> np.ndarray:
        """mask x product of factors, float32. An attempt that ended in an error weighs nothing."""
        weight_T = self.rollout.mask_T.astype(np.float32)
        if self.rollout.finish == "error":
            return np.zeros_like(weight_T)
        for name in sorted(self.credits):
            # a fixed order of multiplication: permuting the rules changes no bit (law 5)
            weight_T = weight_T * np.asarray(self.credits[name].weight_T, dtype=np.float32)
        return weight_T

    @property
    def advantage_offset_T(self) -> np.ndarray:
        """Sum of shifts, nats, float32."""
        advantage_offset_T = np.zeros(self.rollout.length, dtype=np.float32)
        for name in sorted(self.credits):
            advantage_offset_T = advantage_offset_T + np.asarray(
                self.credits[name].advantage_offset_T, dtype=np.float32
            )
        return advantage_offset_T


# siblings of one prompt, in order of `sample`
Group = list[Attempt]
