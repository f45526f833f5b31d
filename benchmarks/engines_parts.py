"""Samplers and teachers, in this process and in a vLLM server. Used by engines.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from itertools import islice
from typing import Any

from engines_table import Asked, Table, in_turns

# K of the lists of the student's and of the teacher's tokens
LISTED = (1, 8, 32)

# --- samplers


def recipe(asked: Asked, sampler: dict[str, Any]) -> Any:
    from reflux.config.recipe import load_recipe

    changes = {
        "learner.model": asked.student,
        "teachers.main.model": asked.teacher,
        "threads": asked.threads,
        "prompts_per_step": asked.prompts,
        **{f"sampler.{key}": value for key, value in sampler.items()},
        "sampler.max_tokens": asked.tokens,
    }
    return load_recipe("quickstart", changes)


async def opened(stack: AsyncExitStack, asked: Asked, name: str, sampler: dict[str, Any]) -> Any:
    """A sampler, as evaluations ask it."""
    from reflux import checks
    from reflux.config.recipe import part_context
    from reflux.evals.evaluation import Evaluation
    from reflux.runtime.services import Services

    cfg = recipe(asked, sampler)
    context = part_context(cfg, checks.join(cfg), "sampler", asked.folder / name)
    services = stack.enter_context(closing(Services(cfg.learner.student)))
    open_sampler = await stack.enter_async_context(cfg.sampler.open(context, services))
    return Evaluation(context, services, cfg.sampler, open_sampler, None)  # type: ignore[arg-type]


async def compare_samplers(asked: Asked) -> None:
    from reflux.config.step_context import SamplingParams
    from reflux.runtime.weights import InMemory

    net = float32(asked.student)
    speed, renewal = Table("tokens a second"), Table("seconds until it has new weights")
    rollouts: dict[str, list[Any]] = {}
    async with AsyncExitStack() as stack:
        where = {"python": asked.python} if asked.url is None else {"mode": "url", "url": asked.url}
        kinds = {"hf": {"kind": "hf"}, "vllm": {"kind": "vllm", **where}}
        asking = {name: await opened(stack, asked, name, table) for name, table in kinds.items()}
        prompts = list(islice(asking["hf"].task.prompts("train", 0, 0), asked.prompts))

        async def renewed(name: str) -> float:
            began = time.perf_counter()
            await asking[name].sampler.publish(InMemory.of(net.state_dict(), 0), 0)
            return time.perf_counter() - began

        async def sampled(name: str) -> float:
            began = time.perf_counter()
            groups = await asking[name].groups(prompts, 1, SamplingParams(0, "train", asked.tokens))
            seconds = time.perf_counter() - began
            rollouts[name] = [attempt.rollout for group in groups for attempt in group]
            return sum(rollout.length for rollout in rollouts[name]) / seconds

        for table, act in ((renewal, renewed), (speed, sampled)):
            arms = {name: lambda name=name, act=act: act(name) for name in kinds}
            await in_turns(table, asked.rounds, arms)
    speed.print("sampler")
    renewal.print("sampler")
    for name, found in rollouts.items():
        gaps = [gap for rollout in found for gap in differences(net, rollout)]
        print(
            f"    {name:24} log-probs differ from transformers by {max(gaps):.2g} nats at most, "
            f"{statistics.fmean(gaps):.2g} on average, {len(gaps)} tokens"
        )


def float32(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from reflux.models.locations import local_folder

    folder = local_folder(model, "model") or model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def differences(net: Any, rollout: Any) -> list[float]:
    import torch

    ids = torch.tensor([[*rollout.prompt_tokens.tolist(), *rollout.tokens_T.tolist()]])
    with torch.inference_mode():
        logp_TV = net(input_ids=ids).logits[0, len(rollout.prompt_tokens) - 1 : -1].log_softmax(-1)
    own_T = logp_TV.gather(-1, torch.from_numpy(rollout.tokens_T)[:, None])[:, 0]
    return (own_T - torch.from_numpy(rollout.logp_T)).abs().tolist()


# --- teachers


def with_lists(rollouts: Sequence[Any], vocabulary: int, k: int) -> list[Any]:
    """The same attempts with `k` random tokens at each position as those of the student."""
    import numpy as np

    from reflux.types import TopKTarget

    rng = np.random.default_rng(0)
    made = []
    for rollout in rollouts:
        ids_TK = rng.integers(0, vocabulary, (rollout.length, k))
        logp_TK = np.full(ids_TK.shape, -9.0, np.float32)
        listed = TopKTarget(teacher="behaviour", ids_TK=ids_TK, logp_TK=logp_TK, logp_T=rollout.logp_T)
        made.append(replace(rollout, behaviour=listed))
    return made


async def answers(asked: Asked) -> list[Any]:
    """The attempts that the teachers score, from the sampler of this process."""
    from reflux.config.step_context import SamplingParams

    async with AsyncExitStack() as stack:
        asking = await opened(stack, asked, "answers", {"kind": "hf"})
        prompts = list(islice(asking.task.prompts("train", 0, 0), asked.prompts))
        groups = await asking.groups(prompts, 1, SamplingParams(0, "train", asked.tokens))
        return [attempt.rollout for group in groups for attempt in group]


async def compare_teachers(asked: Asked) -> None:
    from reflux.engines.vllm_command import ServerSettings, installed_in
    from reflux.engines.vllm_server import VLLMServer
    from reflux.models.locations import local_folder

    if asked.url is not None:
        return await measure_teachers(asked, asked.url)
    folder = local_folder(asked.teacher, "teacher")
    settings = ServerSettings(
        installed=installed_in(asked.python, "--vllm-python"), model=str(folder), dtype="float32"
    )
    settings = replace(settings, context_tokens=512)
    limits = {"concurrency": 64, "timeout_s": 600.0, "start_timeout_s": 1700.0}
    server = await VLLMServer.started(settings, asked.folder / "teacher.log", folder=None, **limits)
    try:
        await measure_teachers(asked, server.requests.url)
    finally:
        await server.close()


async def measure_teachers(asked: Asked, url: str) -> None:
    from reflux.config.recipe import part_context
    from reflux.config.registry import build
    from reflux.config.requirements import Requirements
    from reflux.models.chat.token_map import vocabulary_size
    from reflux.runtime.services import Services
    from reflux.teachers.base import plain_requests

    cfg, rollouts = recipe(asked, {"kind": "hf"}), await answers(asked)
    served = {"kind": "vllm", "model": asked.teacher, "url": url}
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "local": ({"kind": "local", "model": asked.teacher}, 0),
        "hidden": ({**served, "gives": "hidden"}, 0),
        **{f"student_topk, K = {k}": ({**served, "gives": "student_topk"}, k) for k in LISTED},
        **{f"teacher_topk, K = {k}": ({**served, "gives": "teacher_topk", "k": k}, 0) for k in LISTED},
        "sampled": ({**served, "gives": "sampled"}, 0),
    }
    table = Table("positions a second")
    async with AsyncExitStack() as stack:
        services = stack.enter_context(closing(Services(cfg.learner.student)))
        vocabulary, arms = vocabulary_size(services.tokenizer), {}
        for name, (fields, k) in kinds.items():
            wants = Requirements(behaviour=k, candidates=k)
            context = part_context(cfg, wants, name, asked.folder)
            part = build("teachers", fields, "teachers.main")
            teacher = await stack.enter_async_context(part.open(context, services))
            listed = with_lists(rollouts, vocabulary, k) if k else rollouts
            requests = [replace(one, requirements=wants) for one in plain_requests(listed)]
            arms[name] = lambda teacher=teacher, requests=requests: scored(teacher, requests)
        await in_turns(table, asked.rounds, arms)
    table.print("teacher")


async def scored(teacher: Any, requests: Sequence[Any]) -> float:
    """Positions a second. Every attempt must have an answer."""
    began = time.perf_counter()
    answers = await teacher.score(requests)
    seconds = time.perf_counter() - began
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    return sum(request.rollout.length for request in requests) / seconds
