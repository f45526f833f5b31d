"""Parts opened alone, in this process or another one: what they do there comes back as plain bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

# makes the device of the suite known to the process
import device  # noqa: F401
from reflux.config.context import PartContext
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.loss.step import StepRequest
from reflux.objectives.sampled_kl import SampledKL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.runtime.services import Services
from reflux.runtime.weights import InMemory
from reflux.teachers.base import TeacherRequest
from reflux.types import (
    Attempt,
    FlowRollout,
    Prompt,
    SampledTarget,
    TeacherAnswer,
    TokenRollout,
    VelocityTarget,
)


def done_by(packed: bytes) -> Any:
    """What a pickled (kind, part, context, more) does when it is opened alone. Called in a process that holds
    nothing else.
    """
    torch.set_num_threads(1)
    kind, part, context, more = pickle.loads(packed)
    return plain(asyncio.run(_DOES[kind](part, context, more)))


async def sampler(part: Any, context: PartContext, more: Any) -> Any:
    """Samples, follows new weights, samples again."""
    services = Services(context.student)
    async with part.open(context, services) as opened:
        draw = dataclasses.replace(part.draw(0), cohort=len(more["prompts"]))

        async def sample(purpose: str) -> list[list[Attempt]]:
            asked = dataclasses.replace(draw, purpose=purpose)
            return list(
                await asyncio.gather(*(opened.sample(prompt, 2, asked) for prompt in more["prompts"]))
            )

        before = [await sample("train"), await sample("eval")]
        await opened.publish(InMemory.of(more["weights"], 3), 4)
        after = await sample("train")
    services.close()
    return before, after


async def teacher(part: Any, context: PartContext, more: Any) -> Any:
    """Is told of weights, answers, is saved; another one takes that up and answers too."""
    services = Services(context.student)
    requests = [
        TeacherRequest(rollout, TeacherPrompt(rollout.prompt.messages), context.requirements)
        for rollout in more["rollouts"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        async with part.open(context, services) as opened:
            await opened.publish(InMemory.of(more["weights"], 1), 1)
            await opened.publish(InMemory.of(more["later"], 2), 2)
            answers = await opened.score(requests)
            opened.save(Path(folder))
        async with part.open(context, services) as again:
            again.load(Path(folder))
            await again.publish(InMemory.of(more["later"], 2), 2)
            later = await again.score(requests)
    services.close()
    return [[dataclasses.replace(answer, seconds=0.0) for answer in some] for some in (answers, later)]


async def learner(part: Any, context: PartContext, more: Any) -> Any:
    """Makes two steps, says what it observes, and what it publishes. Another one takes up its state, and both
    make the next step.
    """
    services = Services(context.student)
    groups = [[attempt] for attempt in more["attempts"]]
    first, second, next_one = (
        StepRequest(groups, more["objectives"], StepContext(step, context.seed)) for step in range(3)
    )
    with tempfile.TemporaryDirectory() as folder:
        async with part.open(context, services) as opened:
            results = [await opened.step(request) for request in (first, second)]
            seen = await opened.observe(groups)
            weights = opened.publish()
            found = (
                [result.records for result in results],
                {name: stat.value for name, stat in results[-1].stats.items()},
            )
            moved = weights.version, [(name, value.clone()) for name, value in weights.tensors()]
            opened.save(Path(folder) / "state")
            opened.export(Path(folder) / "student")
            later = (await opened.step(next_one)).records
        # A process has one group of ranks at a time, so the first learner is closed.
        async with part.open(context, services) as again:
            again.load(Path(folder) / "state")
            both = [later, (await again.step(next_one)).records]
    services.close()
    return found, seen, moved, both


async def reward(part: Any, context: PartContext, more: Any) -> Any:
    services = Services(context.student)
    async with part.open(context, services) as opened:
        found = await opened.score(more["group"])
    services.close()
    return found


async def task(part: Any, context: PartContext | None, more: Any) -> Any:
    """Its prompts of two splits, verdicts on two answers to each, and whether it opens environments."""
    prompts = [prompt for split in ("train", "validation") for prompt in islice(part.prompts(split, 5, 0), 3)]
    verdicts = [part.verify(prompt, made) for prompt in prompts for made in more["made"](prompt)]
    return prompts, verdicts, [part.open_env(prompt, 0) is None for prompt in prompts]


_DOES: dict[str, Callable[..., Any]] = {
    "sampler": sampler,
    "teacher": teacher,
    "learner": learner,
    "reward": reward,
    "task": task,
}


def as_texts(prompt: Prompt) -> tuple[str, str]:
    return f"Answer: {prompt.answer}", "Answer: no idea"


def as_pictures(prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((16, 16), dtype=np.uint8), np.full((16, 16), 255, dtype=np.uint8)


def with_targets(rollouts: Sequence[Any]) -> tuple[list[Attempt], tuple[Any, ...]]:
    """Attempts that a learner needs no head to learn from, and their objective."""
    rng = np.random.default_rng(0)
    attempts = [Attempt(rollout) for rollout in rollouts]
    for attempt in attempts:
        rollout = attempt.rollout
        if isinstance(rollout, TokenRollout):
            target: Any = SampledTarget(
                teacher="main", logp_T=rng.uniform(-5, -1, rollout.length).astype(np.float32)
            )
        else:
            assert isinstance(rollout, FlowRollout)
            target = VelocityTarget(
                teacher="main", v_TD=rng.normal(size=rollout.x_SD[1:].shape).astype(np.float32)
            )
        attempt.answers["main"] = TeacherAnswer(target=target)
    flows = isinstance(rollouts[0], FlowRollout)
    return attempts, (VelocityKL(),) if flows else (SampledKL(),)


def plain(value: Any) -> Any:
    """Values that two processes can compare bit for bit."""
    if isinstance(value, torch.Tensor):
        return (
            "tensor",
            str(value.dtype),
            tuple(value.shape),
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (
            type(value).__name__,
            {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)},
        )
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path | str | int | float | bool | type(None)):
        return repr(value)
    raise TypeError(f"{type(value).__name__} cannot be compared between processes")
