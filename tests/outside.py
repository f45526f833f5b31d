"""Parts from outside the library, found by their dotted kind, as a user's own would be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt, retold
from reflux.contexts.same import Same
from reflux.credit.base import CreditPart
from reflux.evals.base import Asked, EvalPart
from reflux.extrapolation.base import ExtrapolationPart, Scoring
from reflux.learners.hf import HF as Learner
from reflux.rewards.base import RewardPart
from reflux.rollouts.environment import Environment, Observation, ToolError
from reflux.runtime.weights import InMemory, Weights
from reflux.samplers.hf import HF as HFSampler
from reflux.storage import checkpoints
from reflux.tasks.base import TaskPart
from reflux.teachers.base import TeacherPart
from reflux.types import (
    Attempt,
    Credit,
    Group,
    Message,
    Prompt,
    Reward,
    Rollout,
    SampledTarget,
    TokenRollout,
    TopKTarget,
)

# what the parts below saw, in order; a test empties it
HEARD: list[tuple[Any, ...]] = []


@dataclass(frozen=True, config=STRICT)
class Dated(Same):
    """The question with a number before it that changes every `every` updates of the student."""

    every: int = 2
    adds_words: ClassVar[bool] = True

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        day = step_context.version // self.every
        told = retold(group[0].rollout.prompt.messages, lambda text: f"{day} {text}")
        return [TeacherPrompt(told) for _ in group]


@dataclass(frozen=True, config=STRICT)
class Half(CreditPart):
    """Every position weighs `factor`."""

    factor: float = 0.5

    gives_offsets: ClassVar[bool] = False
    min_group = 1

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [Credit(weight_T=self.factor) for _ in group]


@dataclass(frozen=True, config=STRICT)
class Chat(TaskPart):
    """Prompts of unequal length; after each of the student's first `replies` turns a user says something.
    verify: 1.0 for every answer.
    """

    replies: int = 0
    word: str = "go on"
    weight: float = 1.0
    route: str | None = None
    tells_routes: bool = True

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None] | None:
        if not self.tells_routes:
            return None
        return frozenset([self.route] if self.route else ["even", "odd"])

    def prompts(self, split: str, seed: int, start: int = 0) -> Iterator[Prompt]:
        position = start
        while split == "train" or position < 8:
            text = f"{split} {seed} " + "ab" * (position % 5) + str(position)
            route = self.route or ("even" if position % 2 == 0 else "odd")
            yield Prompt(f"{split}-{position}", ({"role": "user", "content": text},), "1", ("ok",), route)
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> float:
        return float(len(made) % 2)

    @property
    def multi_turn(self) -> bool:
        return self.replies > 0

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return Talkative(self.word, self.replies) if self.replies else None


@dataclass(frozen=True, config=STRICT)
class Unjudged(Chat):
    """A task with turns whose verifier gives no verdict."""

    replies: int = 1

    @property
    def judges(self) -> bool:
        return False


class Talkative:
    """Answers so many turns with one word."""

    def __init__(self, word: str, replies: int):
        self.word, self.replies = word, replies

    async def step(self, message: Message) -> Observation:
        self.replies -= 1
        return (
            Observation(({"role": "user", "content": self.word},))
            if self.replies >= 0
            else Observation(done=True)
        )

    async def close(self) -> None: ...


@dataclass(frozen=True, config=STRICT)
class Unruly(Chat):
    """Of four prompts, the environment of the first is done at once, that of the second never; then a tool
    fails, and one hangs.
    """

    @property
    def multi_turn(self) -> bool:
        return True

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return Misbehaving(int(prompt.id.rpartition("-")[2]) % 4)


class Misbehaving:
    def __init__(self, manner: int):
        self.manner = manner

    async def step(self, message: Message) -> Observation:
        if self.manner == 2:
            raise ToolError("no such tool")
        if self.manner == 3:
            await asyncio.sleep(3600)
        return Observation(
            ({"role": "user", "content": "go on"},),
            done=self.manner == 0,
            reward=float(len(message["content"])),
        )

    async def close(self) -> None: ...


@dataclass(frozen=True, config=STRICT)
class Patchy(Chat):
    """Prompt number `odd` has no references, and a route of its own."""

    odd: int = 5

    def prompts(self, split: str, seed: int, start: int = 0) -> Iterator[Prompt]:
        for position, prompt in enumerate(Chat.prompts(self, split, seed, start), start):
            yield replace(prompt, references=(), route="nowhere") if position == self.odd else prompt


@dataclass(frozen=True, config=STRICT)
class SlowLearner(Learner):
    """The default learner, but all attempts in flight land while it works."""

    @asynccontextmanager
    async def open(self, context: Any, services: Any) -> AsyncIterator[Any]:
        async with Learner.open(self, context, services) as opened:
            move = opened.step

            async def step(*args: Any) -> Any:
                await asyncio.sleep(0.3)
                return await move(*args)

            opened.step = step
            yield opened


@dataclass(frozen=True, config=STRICT)
class StuckLearner(Learner):
    """The default learner, whose third step takes two minutes: in one model call, or without holding the
    event loop. It says so before.
    """

    holds_the_loop: bool = True

    @asynccontextmanager
    async def open(self, context: Any, services: Any) -> AsyncIterator[Any]:
        async with Learner.open(self, context, services) as opened:
            move = opened.step

            async def step(*args: Any) -> Any:
                if opened.version == 2:
                    print("two minutes begin", flush=True)
                    for _ in range(1200):
                        if self.holds_the_loop:
                            time.sleep(0.1)
                        else:
                            await asyncio.sleep(0.1)
                return await move(*args)

            opened.step = step
            yield opened


@dataclass(frozen=True, config=STRICT)
class KeepsVersions(HFSampler):
    """The default sampler, but of a version that it has had before it takes the weights it had then, as a
    server may.
    """

    @asynccontextmanager
    async def open(self, context: Any, services: Any) -> AsyncIterator[Any]:
        async with HFSampler.open(self, context, services) as opened:
            kept: dict[int, dict[str, Any]] = {}
            put = opened.publish

            async def publish(weights: Weights, step: int) -> None:
                if weights.version not in kept:
                    kept[weights.version] = {name: value.clone() for name, value in weights.tensors()}
                HEARD.append(("published", weights.version))
                await put(InMemory.of(kept[weights.version], weights.version), step)

            opened.publish = publish
            yield opened


@dataclass(frozen=True, config=STRICT)
class Jump(ExtrapolationPart):
    """After step `at` moves every weight by `by` of itself; counts its calls, and remembers its start
    weights' sum.
    """

    at: int = 2
    by: float = 0.01
    prompts: int = 2
    samples: int = 1
    score: Literal["accuracy", "minus_kl"] = "accuracy"

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.prompts, self.samples, self.score)

    @asynccontextmanager
    async def open(self, context: Any, services: Any) -> AsyncIterator[OpenJump]:
        yield OpenJump(self)


class OpenJump:
    def __init__(self, cfg: Jump):
        self.cfg = cfg
        self.calls, self.first = 0, 0.0

    def start(self, access: Any) -> None:
        self.first = float(sum(value.double().sum() for value in access.read(access.names).values()))
        HEARD.append(("start", self.first))

    def fires(self, completed_steps: int) -> bool:
        return completed_steps == self.cfg.at

    async def after_step(self, access: Any, score: Any, completed_steps: int) -> bool:
        self.calls += 1
        if not self.fires(completed_steps):
            return False
        before = await score()
        access.write({name: value * (1 + self.cfg.by) for name, value in access.base(access.names).items()})
        HEARD.append(("jump", completed_steps, before, await score()))
        return True

    def save(self, folder: Path) -> None:
        import torch

        checkpoints.write(
            folder, {"calls": self.calls, "first": self.first, "trace": torch.tensor([float(self.calls)])}
        )

    def load(self, folder: Path) -> None:
        state = checkpoints.read(folder)
        self.calls, self.first = state["calls"], state["first"]
        HEARD.append(("load", self.calls, self.first, state["trace"].tolist()))


@dataclass(frozen=True, config=STRICT)
class ListTeacher(TeacherPart):
    """A teacher elsewhere that answers with a list of its own; it is only checked, never opened."""

    rollouts: ClassVar[type[Rollout]] = TokenRollout
    offers: ClassVar[tuple[type, ...]] = (TopKTarget, SampledTarget)
    in_process: ClassVar[bool] = False
    at_ids: ClassVar[bool] = False
    follows: ClassVar[bool] = False

    context: Any = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()

    def open(self, context: Any, services: Any) -> Any:
        raise AssertionError("it is never opened")


def brightness(prompt: Prompt, image: Any) -> Reward:
    """A judge of images for the task `jsonl`: every one is right, and this bright."""
    return Reward(1.0, {"brightness": float(image.mean()) / 255})


@dataclass(frozen=True, config=STRICT)
class Dark(RewardPart):
    """A reward that asks no task; it is only checked, never opened."""

    weight: float = 1.0

    def open(self, context: Any, services: Any) -> Any:
        raise AssertionError("it is never opened")


@dataclass(frozen=True, config=STRICT)
class Brief(RewardPart):
    """Minus the number of positions, with words on it; attempts at `silent` are not judged."""

    weight: float = 1.0
    silent: str = ""

    @asynccontextmanager
    async def open(self, *known: Any) -> AsyncIterator[Any]:
        yield self

    async def score(self, group: Group) -> list[Reward]:
        return [self._judged(attempt) for attempt in group]

    def _judged(self, attempt: Attempt) -> Reward:
        length = attempt.rollout.length
        if attempt.rollout.prompt.id == self.silent:
            return Reward(None, error="this prompt is not judged")
        return Reward(-float(length), {"odd": float(length % 2)}, f"{length} positions")


@dataclass(frozen=True, config=STRICT)
class Peek(EvalPart):
    """An evaluation that tells one weight of the model that the sampler holds."""

    asked: ClassVar[Asked] = "always"
    split: ClassVar[None] = None
    max_tokens: ClassVar[None] = None

    weight: str

    async def __call__(self, evaluation: Any, source: Any) -> dict[str, Any]:
        return {"first": float(evaluation.sampler.model.net.state_dict()[self.weight].flatten()[0])}


@dataclass(frozen=True, config=STRICT)
class Breaks(EvalPart):
    """An evaluation that raises at one step."""

    asked: ClassVar[Asked] = "always"
    split: ClassVar[None] = None
    max_tokens: ClassVar[None] = None

    at: int

    async def __call__(self, evaluation: Any, source: Any) -> dict[str, Any]:
        if evaluation.step == self.at:
            raise OSError("the evaluation is broken")
        return {"step": evaluation.step}


@dataclass(frozen=True, config=STRICT)
class Weightless(RewardPart):
    """A reward that leaves out what every reward has."""

    def open(self, context: Any, services: Any) -> Any:
        raise AssertionError("it is refused before it is opened")


@dataclass(frozen=True, config=STRICT)
class Showing(HFSampler):
    """The default sampler, with a chart of its own."""

    def diagnostics(self, name: str, recorded: Any) -> list[Any]:
        from reflux.reports.chart import Chart

        return [Chart(f"{name} shows itself", absent="nothing")]


@dataclass(frozen=True, config=STRICT)
class SlowChat(Chat):
    """The user takes 5 to 45 ms for each answer."""

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return Slow(self.word, self.replies, 0.005 + 0.01 * (int(prompt.id.rpartition("-")[2]) % 5))


class Slow(Talkative):
    def __init__(self, word: str, replies: int, seconds: float):
        super().__init__(word, replies)
        self.seconds = seconds

    async def step(self, message: Message) -> Observation:
        await asyncio.sleep(self.seconds)
        return await super().step(message)


@dataclass(frozen=True, config=STRICT)
class Once(SlowChat):
    """Attempts at even prompts must not begin twice."""

    def runs_once(self, prompt: Prompt) -> bool:
        return prompt.route == "even"


@dataclass(frozen=True, config=STRICT)
class Falls(EvalPart):
    """An evaluation whose accuracy is 0.9 before the step `at`, and 0.1 from there on."""

    asked: ClassVar[Asked] = "always"
    split: ClassVar[None] = None
    max_tokens: ClassVar[None] = None

    at: int

    async def __call__(self, evaluation: Any, source: Any) -> dict[str, Any]:
        accuracy = 0.9 if evaluation.step < self.at else 0.1
        return {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "problems": 100}
