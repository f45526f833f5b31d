"""The data types that the parts of the loop exchange.

Names of arrays end in their dimensions:

P prompts per step   G attempts per prompt    T positions of one attempt   S = T + 1 states of a flow
N packed positions of a batch                 K top-k                      V vocabulary
H hidden size                                 D flattened latent

Log-probs are natural logs (nats). Costs are divergences(student, teacher). An advantage is a negative cost.
The data of an attempt are numpy arrays on the host. Hidden states are torch tensors: numpy has no bfloat16.

Example: the prompt "2+3?" is answered by "5<end>", two tokens. T = 2, tokens_T = [21, 1], logp_T =
[-0.1, -0.02], finish = "stop". mask_T = [True, True], because the student also chose the end token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from reflux.loss.targets import (
    GivenTarget,
    HiddenTarget,
    SampledTarget,
    StepRecord,
    TopKTarget,
    VelocityTarget,
)

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, also "tool_calls" or "tool_call_id"
Message = dict[str, Any]
# "error": nothing was sampled. The last three come from an environment, and the attempt is kept up to there.
Finish = Literal["stop", "length", "error", "max_turns", "tool_error", "timeout"]
# Attempts with these finishes get no verdict, because the student did not cause the end. The sampled
# positions keep their weight, except after an "error", which has none.
UNJUDGED: tuple[Finish, ...] = ("error", "tool_error", "timeout")
Target = SampledTarget | TopKTarget | GivenTarget | HiddenTarget | VelocityTarget


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a task. `id` is the same in all epochs. Seeding and reports refer to the `key`."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    # responses written by a teacher or a person, for the `references` sampler
    references: tuple[str, ...] = ()
    # selects the teacher that answers, where several teachers (tables [teachers.NAME]) share an alias
    route: str | None = None
    # 1, or 2 and more where the same prompt occurred before in the same step or evaluation
    occurrence: int = 1

    @property
    def key(self) -> str:
        """The id, or "id#2" for the second occurrence. Different for all prompts of one step."""
        return self.id if self.occurrence == 1 else f"{self.id}#{self.occurrence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt as it was sampled, without reward or targets. It has T positions."""

    # the name of positions, in the plural, in texts for users
    unit: ClassVar[str] = "positions"

    prompt: Prompt
    # index of the attempt in its group
    sample: int
    # the oldest policy version that sampled a position of it
    version: int
    finish: Finish
    # bool, True where the student chose
    mask_T: np.ndarray
    # float32, nats, under the distribution that was sampled from; 0 where the student did not choose
    logp_T: np.ndarray
    # float32, nats, at temperature 1 without top-p; None where that is the distribution sampled from
    logp_raw_T: np.ndarray | None = None
    # int64, the policy version that sampled each position; None where that is `version` everywhere
    version_T: np.ndarray | None = None
    # the outputs of the policy that sampled the attempt, where a part requires them
    behaviour: TopKTarget | SampledTarget | VelocityTarget | None = None
    # positions that the student ran forward to sample it; None: the prompt and every position once
    sampled_positions: int | None = None
    # positions that teachers ran forward to sample it, by NAME of [teachers.NAME]
    drawn_positions: Mapping[str, int] = field(default_factory=dict)

    @property
    def positions_acted(self) -> int:
        """Positions the student ran forward to sample it, prompt included. By default 0 after an error."""
        if self.sampled_positions is not None:
            return self.sampled_positions
        return 0 if self.finish == "error" else self.prompt_length + self.length

    @property
    def length(self) -> int:
        return len(self.mask_T)

    @property
    def policy_logp_T(self) -> np.ndarray:
        """Log-probs of the sampled choices under the policy itself, at temperature 1 without top-p; nats. An
        importance ratio divides by the probabilities of `logp_T`, the distribution that was sampled from.
        """
        return self.logp_T if self.logp_raw_T is None else self.logp_raw_T

    @property
    def prompt_length(self) -> int:
        """Positions that a model reads before the first position of the attempt, for FLOP accounting."""
        return 0

    @property
    def made(self) -> Any:
        """The result that a verifier judges and reports show: a text or an image."""
        raise NotImplementedError(f"{type(self).__name__} does not define `made`, the result of an attempt")

    def computed(self, rows_N: np.ndarray) -> int:
        """Positions that a learner runs forward and backward to train on those in `rows_N` (ascending)."""
        return len(rows_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRollout(Rollout):
    """A text attempt. Position t is predicted by the state after prompt_tokens + tokens_T[:t]. The text is
    never tokenised again.
    """

    unit: ClassVar[str] = "tokens"

    # int64
    prompt_tokens: np.ndarray
    # int64; the response with its sampled end token; tool and user text is masked out
    tokens_T: np.ndarray
    # the student's tokens decoded without special tokens; turns are separated by a line break
    text: str
    # the whole conversation, the student's turns included
    messages: tuple[Message, ...]
    # int64: the characters [start, end) of `text` of each token, start = end for none; None if not required
    spans_T2: np.ndarray | None = None
    # the sum of the environment's rewards for all turns; None where it gave none
    environment_reward: float | None = None
    # bool, True at special tokens that do not end a turn; None if not required
    special_T: np.ndarray | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_tokens)

    @property
    def made(self) -> str:
        return self.text

    def computed(self, rows_N: np.ndarray) -> int:
        """All positions up to the last of `rows_N`: a token is predicted from all tokens before it."""
        return int(rows_N[-1]) + 1 if len(rows_N) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRollout(Rollout):
    """An image sampled by a flow model: S = T + 1 states at the times t_S (1 noise, 0 data). The last step of
    a complete grid is masked out.
    """

    unit: ClassVar[str] = "steps"

    # float32; D = 0 where no latent values were kept, and then no position is trained on
    x_SD: np.ndarray
    # float32, descending
    t_S: np.ndarray
    # the sampler's noise level; at 0 no step is random: each next state is the mean of its step
    noise_level: float
    guidance: float
    # uint8, [height, width] or [height, width, 3]: the last state as an image
    image: np.ndarray

    @property
    def made(self) -> np.ndarray:
        return self.image


@dataclass(frozen=True, slots=True)
class Reward:
    """The judgement of one attempt by a task or a reward, also as it is recorded. value None: the attempt was
    not judged. That is not the same as a wrong answer.

    parts: further numbers by name, unweighted. feedback: a text about the attempt, for contexts that show it.
    error: a sentence that says why there is no value (timeout, the verifier failed, sampling ended in an
    error); None where there is a value.
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
    """The result of one credit rule for one attempt. Weight and offset are scalars or arrays [T]."""

    # multiplies the weight; finite and >= 0
    weight_T: np.ndarray | float = 1.0
    # nats, added to the advantage
    advantage_offset_T: np.ndarray | float = 0.0
    # for metrics.jsonl, under the rule's name: numbers or `Metric`s, averaged over attempts that have them
    notes: dict[str, Any] = field(default_factory=dict)
    # plain JSON values, written to the attempt's line and never averaged
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswer:
    """The answer of one teacher for one attempt. The teacher sets the first five fields, its caller the rest.

    If a teacher could not answer, `target` is None and `error` says why in one sentence. The failure is
    counted in the metrics, and the teacher is asked again.
    """

    target: Target | None = None
    # the teacher's log-probs at the token ids of `rollout.behaviour`, where a part requires them
    candidates: TopKTarget | None = None
    # positions the teacher ran forward, context included, over all times it was asked; for FLOP accounting
    positions_read: int = 0
    # seconds of the call; an equal part of them for each attempt of a batched call
    seconds: float = 0.0
    error: str | None = None
    # NAME of the table [teachers.NAME] that was asked; several tables may share an alias
    table: str = ""
    # hash of the TeacherPrompt; the teacher is asked again if the prompt has changed
    context_hash: str = ""
    # `TeacherPrompt.notes`: numbers about what the context showed
    context_notes: dict[str, float] = field(default_factory=dict)
    # the target before the teacher was asked again, because its context had changed
    previous: Target | None = None
    # KL(target || previous) at each position, nats, where a part requires it
    drift_T: np.ndarray | None = None
    # the teacher's log-probs at the current student's likeliest tokens, where a part requires them
    now_candidates: TopKTarget | None = None


@dataclass(slots=True)
class Attempt:
    """All data of one attempt. The target of a teacher that was not asked or gave none is None."""

    rollout: Rollout
    reward: Reward | None = None
    # by teacher name, in the order of names
    answers: dict[str, TeacherAnswer] = field(default_factory=dict)
    # the current student's outputs at the positions of this attempt, where a part requires them
    now: Target | None = None
    # what the optimiser step computed at each position; None before the step, and without trained positions
    learned: StepRecord | None = None
    # by credit rule
    credits: dict[str, Credit] = field(default_factory=dict)
    # the optimiser step (from 0) that it was sampled for; with staleness it may be trained in another one
    asked_step: int = 0

    def target(self, teacher: str) -> Target | None:
        """The target of `teacher` (an alias), or None. "behaviour": the policy that sampled the attempt."""
        if teacher == "behaviour":
            return self.rollout.behaviour
        answer = self.answers.get(teacher)
        return None if answer is None else answer.target

    @property
    def verdict(self) -> float | None:
        """The reward's value. None where it is missing or not finite, or where the finish is in UNJUDGED."""
        value = None if self.reward is None or self.rollout.finish in UNJUDGED else self.reward.value
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def weight_T(self) -> np.ndarray:
        """mask times the product of the credit rules' weights, float32; 0 after an error."""
        weight_T = self.rollout.mask_T.astype(np.float32)
        if self.rollout.finish == "error":
            return np.zeros_like(weight_T)
        for name in sorted(self.credits):
            # The order of multiplication is fixed, so permuting the rules changes no bit (law 5).
            weight_T = weight_T * np.asarray(self.credits[name].weight_T, dtype=np.float32)
        return weight_T

    @property
    def advantage_offset_T(self) -> np.ndarray:
        """Sum of the credit rules' advantage offsets, nats, float32."""
        advantage_offset_T = np.zeros(self.rollout.length, dtype=np.float32)
        for name in sorted(self.credits):
            offset_T = np.asarray(self.credits[name].advantage_offset_T, dtype=np.float32)
            advantage_offset_T = advantage_offset_T + offset_T
        return advantage_offset_T


# the attempts at one prompt, in order of `sample`
Group = list[Attempt]
