"""The nouns: what passes between the parts of the loop.

Dimension key, used as suffixes everywhere:
P prompts per step  G attempts per prompt  T positions of one attempt  S = T + 1 states of a flow  N packed positions of a batch
K top-k             V vocabulary           H hidden size               D flattened latent

Log-probs are natural logs (nats). Costs are divergences(student, teacher); an advantage is a negative cost. What is kept per
attempt lives in numpy arrays on the host; only hidden states are torch tensors (numpy has no bfloat16).

One worked example: the prompt "2+3?" answered "5<end>" by one token each. T = 2, tokens_T = [21, 1], mask_T = [True, True] (the
sampled end token is a choice like any other), logp_T = [-0.1, -0.02], finish = "stop".
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from reflux.loss.targets import HiddenTarget, SampledTarget, StepRecord, TopKTarget, VelocityTarget

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, and where tools are called also "tool_calls" or "tool_call_id".
Message = dict[str, Any]
Purpose = Literal["train", "eval", "score"]
# "error": nothing was sampled. The last three come from an environment: its attempt is kept as far as it went.
Finish = Literal["stop", "length", "error", "max_turns", "tool_error", "timeout"]
# What is no fault of the student gets no verdict. Its choices are real and keep their weight; an "error" has none.
UNJUDGED: tuple[Finish, ...] = ("error", "tool_error", "timeout")
Target = SampledTarget | TopKTarget | HiddenTarget | VelocityTarget


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `id` is stable across epochs: seeding, resume and reports refer to it."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    references: tuple[str, ...] = ()  # answers written by a teacher or a person, for the `references` sampler
    route: str | None = None  # which teacher table answers, where several share a name


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an attempt is to be sampled. `cohort` groups are asked for together: in-process parts wait for all of them."""

    step: int  # the optimiser step the attempt is meant for, from 0
    purpose: Purpose
    max_positions: int  # of the attempt
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    cohort: int = 1
    rng: int = 0  # another number: other random numbers for the same prompts at the same step


@dataclass(frozen=True, slots=True)
class StepContext:
    """What pure parts may know of now: the optimiser step (from 0) and random numbers of their own."""

    step: int
    seed: int

    def rng(self, *key: object) -> random.Random:
        """A generator that depends on (run seed, step, key) and nothing else (law 8)."""
        return random.Random(seed_of(self.seed, self.step, *key))


def seed_of(*key: object) -> int:
    """A 63-bit integer from any printable key, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt as it was acted out, before anyone judged it. T positions, of which mask_T says where the student chose."""

    unit: ClassVar[str] = "positions"  # what a position is called

    prompt: Prompt
    sample: int  # index in its group
    version: int  # policy version of its first turn
    finish: Finish
    mask_T: np.ndarray  # bool
    logp_T: np.ndarray  # float32, nats, under the distribution sampled from; 0 where the student did not choose
    logp_raw_T: np.ndarray | None = None  # at temperature 1 without top-p, where that differs
    behaviour: TopKTarget | SampledTarget | VelocityTarget | None = None
    sampled_positions: int | None = None  # that the student ran forward to make it; None: the prompt and every position once
    drawn_positions: Mapping[str, int] = field(default_factory=dict)  # that teachers ran forward to draw it, by their table

    @property
    def positions_acted(self) -> int:
        """Positions that the student ran forward to make this, prompts included; of an attempt that ended in an error, none by default."""
        if self.sampled_positions is not None:
            return self.sampled_positions
        return 0 if self.finish == "error" else self.prompt_length + self.length

    @property
    def length(self) -> int:
        return len(self.mask_T)

    @property
    def policy_logp_T(self) -> np.ndarray:
        """Log-probs of what was chosen under the policy itself, at temperature 1 without top-p; nats.

        These are what a divergence from a teacher and a comparison with the student of now are about. An importance ratio divides by
        `logp_T` instead, the distribution that was sampled from.
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
    """A text attempt. Position t is predicted by the state after prompt_tokens + tokens_T[:t]; nothing is ever tokenised again."""

    unit: ClassVar[str] = "tokens"

    prompt_tokens: np.ndarray  # int64
    tokens_T: np.ndarray  # int64; response positions, the sampled end token included, tool and user text masked out
    text: str  # what the student wrote, decoded without special tokens; several turns one line apart
    messages: tuple[Message, ...]  # the whole conversation, the student's turns included
    spans_T2: np.ndarray | None = None  # int64, where wanted: characters [start, end) of `text` that each token wrote; start = end for none
    environment_reward: float | None = None  # the sum of what the environment gave its turns; None where it gave nothing
    special_T: np.ndarray | None = None  # bool, where wanted: True at special tokens that do not end a turn

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
    """An image drawn by a flow: S = T + 1 states along times t_S (1 noise, 0 data). The last step of a whole grid is masked out."""

    unit: ClassVar[str] = "steps"

    x_SD: np.ndarray  # float32; D = 0 where no latent value was kept, and then no position counts
    t_S: np.ndarray  # float32, falling
    noise_level: float  # 0: no step was drawn, each is its mean
    guidance: float
    image: np.ndarray  # uint8, [height, width] or [height, width, 3]: the last state as an image

    @property
    def made(self) -> np.ndarray:
        return self.image


@dataclass(frozen=True, slots=True)
class Reward:
    """What was found of one attempt: by a task, by a reward, in the record. value None: not judged, which is not the same as wrong.

    parts: numbers beside the value, by name, unweighted. feedback: words on the attempt, for contexts that show them. error: why there is
    no value, in a sentence (no time left, the verifier failed, sampling ended in an error); None where there is one.
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
    """One credit rule's word on one attempt. A scalar or an array [T]; notes are merged into the metrics under the rule's name."""

    weight_T: np.ndarray | float = 1.0  # multiplies the weight; finite and >= 0
    advantage_offset_T: np.ndarray | float = 0.0  # nats added to the advantage
    notes: dict[str, Any] = field(default_factory=dict)  # a plain number is averaged over the attempts that have it; or a `metrics.Metric`
    detail: dict[str, Any] = field(default_factory=dict)  # plain JSON values, written beside the attempt and never averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswer:
    """What one teacher answered when it was asked about one attempt. A teacher gives the first five fields, who asked adds the others.

    A teacher that could not answer has no target, and says why in one sentence: it is counted in the metrics, and asked again.
    """

    target: Target | None = None
    candidates: TopKTarget | None = None  # its log-probs at the ids of `rollout.said`, where that is required
    positions_read: int = 0  # the student's and those before them, over all times it was asked; for FLOP accounting
    seconds: float = 0.0  # of the call, or of a batched call an equal part
    error: str | None = None
    table: str = ""  # that was asked: several may share a name
    context_hash: str = ""  # of the view it was asked in: in another one it is asked again
    context_notes: dict[str, float] = field(default_factory=dict)  # `View.notes`: what the context showed, in numbers
    previous: Target | None = None  # what it answered before it was asked again; freshness compares the two
    now_candidates: TopKTarget | None = None  # its log-probs at the student's likeliest tokens of now, where that is required


@dataclass(slots=True)
class Attempt:
    """Everything known of one attempt, on one object. An absent target means: that teacher was not asked, or stayed silent."""

    rollout: Rollout
    reward: Reward | None = None
    answers: dict[str, TeacherAnswer] = field(default_factory=dict)  # by teacher name, in the order of names
    now: Target | None = None  # what the student would say now, along these tokens
    learned: StepRecord | None = None  # what the step computed along it; None before the step, and where nothing was trained on
    credits: dict[str, Credit] = field(default_factory=dict)

    def target(self, teacher: str) -> Target | None:
        """What `teacher` said about this attempt; "said" is the student as it acted."""
        if teacher == "behaviour":
            return self.rollout.behaviour
        answer = self.answers.get(teacher)
        return None if answer is None else answer.target

    @property
    def verdict(self) -> float | None:
        """The reward's value. None where it was not judged (also by a number that is not finite), or ended in an error."""
        value = None if self.reward is None or self.rollout.finish in UNJUDGED else self.reward.value
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def weight_T(self) -> np.ndarray:
        """mask x product of factors, float32. An attempt that ended in an error weighs nothing."""
        weight_T = self.rollout.mask_T.astype(np.float32)
        if self.rollout.finish == "error":
            return np.zeros_like(weight_T)
        for name in sorted(self.credits):  # a fixed order of multiplication: permuting the rules changes no bit (law 5)
            weight_T = weight_T * np.asarray(self.credits[name].weight_T, dtype=np.float32)
        return weight_T

    @property
    def advantage_offset_T(self) -> np.ndarray:
        """Sum of shifts, nats, float32."""
        advantage_offset_T = np.zeros(self.rollout.length, dtype=np.float32)
        for name in sorted(self.credits):
            advantage_offset_T = advantage_offset_T + np.asarray(self.credits[name].advantage_offset_T, dtype=np.float32)
        return advantage_offset_T


Group = list[Attempt]  # siblings of one prompt, in order of `sample`


@dataclass(frozen=True, slots=True)
class Requirements:
    """What the assembled parts want computed. Work nobody wants is not done; the largest k wins. Joined by `|`."""

    behaviour: int = 0  # the student's own top-k where it acted
    now_at_behaviour: bool = False  # the student's log-probs of now at the ids of `behaviour`
    now_topk: int = 0
    logp: bool = False  # the teacher's log-probs of the sampled tokens, at scoring time
    candidates: int = 0  # the teacher's log-probs at the student's top-k ids
    now_candidates: int = 0  # and at the student's top-k ids of now
    spans: bool = False  # which characters of its text each token wrote
    specials: bool = False  # which tokens are special and do not end a turn
    reward: bool = False

    def __or__(self, other: Requirements) -> Requirements:
        return Requirements(
            behaviour=max(self.behaviour, other.behaviour),
            now_at_behaviour=self.now_at_behaviour or other.now_at_behaviour,
            now_topk=max(self.now_topk, other.now_topk),
            logp=self.logp or other.logp,
            candidates=max(self.candidates, other.candidates),
            now_candidates=max(self.now_candidates, other.now_candidates),
            spans=self.spans or other.spans,
            specials=self.specials or other.specials,
            reward=self.reward or other.reward,
        )
