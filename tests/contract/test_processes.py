"""Shipped samplers, teachers, learners and the verifier, opened in a spawned process from pickled values,
give the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alone
import tiny
import tiny_flow
from fake_python import fake_python
from fake_vllm import fake_vllm_of, serving
from reflux.config.bases import recipe_names
from reflux.config.context import Generation
from reflux.config.recipe import load_recipe, part_context
from reflux.config.registry import build, kinds
from reflux.config.requirements import Requirements
from reflux.models.text import load_model
from reflux.samplers.flow import Flow as FlowSampler
from reflux.tasks.word_problems import WordProblems
from reflux.types import Attempt, Prompt

WANTS = Requirements(behaviour=3, now_at_behaviour=True, logp=True, candidates=3, spans=True, reward=True)
FLOW = FlowSampler(steps=4, eval_steps=3)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """One spawned process: it inherits nothing but the path of modules."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("flows")
    return {name: tiny_flow.save(folder / name, seed) for seed, name in enumerate(("student", "teacher"))}


@pytest.fixture(scope="module")
def served(teacher: str) -> Iterator[str]:
    """The address of a server with the teacher's model."""
    model = load_model(teacher, "model", dtype="float32", device="cpu")
    with serving(fake_vllm_of(model)) as fake:
        yield fake.url


def same_bits(elsewhere: ProcessPoolExecutor, *packed: Any) -> Any:
    """Done here and there, from the same bytes."""
    data = pickle.dumps(packed)
    here = alone.done_by(data)
    assert elsewhere.submit(alone.done_by, data).result(timeout=100) == here
    return here


def published(net: Any) -> dict[str, Any]:
    """Its weights as they go from one process to another."""
    return {name: value.cpu() for name, value in net.state_dict().items()}


def texts(number: int = 2) -> list[Prompt]:
    return list(islice(WordProblems().prompts("train", 0), number))


def images(number: int = 2) -> list[Prompt]:
    return [Prompt(f"p{i}", ({"role": "user", "content": tiny_flow.TEXTS[1 + i]},)) for i in range(number)]


def attempts(folder: Path) -> str:
    """A file with two attempts at each of the first prompts."""
    lines = [
        json.dumps({"prompt_id": prompt.id, "response_ids": [9, 9 + i, 1], "logprobs": [-1, -2, -0.5]})
        for prompt in texts()
        for i in range(2)
    ]
    (folder / "attempts.jsonl").write_text("\n".join(lines))
    return str(folder / "attempts.jsonl")


# Each shipped part with what it needs to be opened; a part that is added to a registry and not here fails the
# test of its group.
SAMPLERS: dict[str, dict[str, Any]] = {
    "hf": {"max_tokens": 8},
    "references": {"generate": {"kind": "hf", "max_tokens": 8}},
    "imported": {"path": "attempts.jsonl", "generate": {"kind": "hf", "max_tokens": 8}},
    "flow": {"steps": 4, "eval_steps": 3},
    "vllm": {"max_tokens": 8},
    "teacher_samples": {"generate": {"kind": "flow", "steps": 4, "eval_steps": 3}, "positions": 3},
}
TEACHERS = {"local": "model", "self": "", "flow": "model", "vllm": "model"}
LEARNERS: dict[str, dict[str, Any]] = {
    "hf": {"lr": 1e-3},
    "fsdp": {"lr": 1e-3},
    "flow": {"lr": 1e-3, "micro_batch": 3},
}
REWARDS: dict[str, dict[str, Any]] = {"verifier": {}}
TASKS: dict[str, dict[str, Any]] = {
    "word_problems": {},
    "chains": {},
    "shopping": {},
    "calculator": {},
    "ledger": {},
    "glyphs": {},
    "mix": {"parts": {"a": {"kind": "word_problems"}, "b": {"kind": "word_problems", "largest": 20}}},
    "answered": {"of": {"kind": "word_problems"}, "teacher": {"kind": "local"}, "path": "index.jsonl"},
    "gsm8k": {"path": ".", "validation": 0.5},
    "jsonl": {"path": "rows.jsonl", "validation": 0.5},
    "verifiers": {"taskset": "adding", "validation": 0.5},
}


def told(kind: str, student: str, flows: dict[str, str], **fields: Any) -> Any:
    """The context of a part of texts or images."""
    common = (
        {"generation": FLOW.generation, "model": flows["student"]}
        if kind in ("flow", "teacher_samples")
        else {"model": student}
    )
    return tiny.context(WANTS, **{"task": WordProblems(), "generation": Generation(), **common, **fields})


def test_no_shipped_part_is_forgotten() -> None:
    tables = {"samplers": SAMPLERS, "teachers": TEACHERS, "learners": LEARNERS, "tasks": TASKS}
    assert {group: sorted(table) for group, table in tables.items()} == {
        group: sorted(kinds(group)) for group in tables
    }
    assert set(REWARDS) <= set(kinds("rewards"))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers(
    elsewhere: ProcessPoolExecutor, student: str, flows: dict[str, str], kind: str, tmp_path: Path
) -> None:
    # Each of both processes starts a server of its own.
    server = {"python": fake_python(tmp_path).path} if kind == "vllm" else {}
    stored = {"path": attempts(tmp_path)} if kind == "imported" else {}
    part = build("samplers", {"kind": kind, **SAMPLERS[kind], **server, **stored}, "sampler")
    teachers = (
        {"main": build("teachers", {"kind": "flow", "model": flows["teacher"]}, "teachers.main")}
        if kind == "teacher_samples"
        else {}
    )
    flow = kind in ("flow", "teacher_samples")
    weights = published(tiny_flow.model(5).net if flow else tiny.net(5, lift=1.5))
    context = told(kind, student, flows, name="sampler", teachers=teachers, folder=tmp_path / "part")
    # The sampler `imported` knows from these which attempts belong to the step.
    sizes = dataclasses.replace(context.numbers, prompts_per_step=2, group_size=2)
    context = dataclasses.replace(context, numbers=sizes)
    before, after = same_bits(
        elsewhere, "sampler", part, context, {"prompts": images() if flow else texts(), "weights": weights}
    )
    if part.on_policy:
        assert before[0] != after


@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers(
    elsewhere: ProcessPoolExecutor, student: str, teacher: str, flows: dict[str, str], served: str, kind: str
) -> None:
    model = {"model": flows["teacher"] if kind == "flow" else teacher} if TEACHERS[kind] else {"ema": 0.5}
    model |= {"url": served, "gives": "hidden", "device": "cpu"} if kind == "vllm" else {}
    part = build("teachers", {"kind": kind, **model}, "teachers.main")
    flow = kind == "flow"
    rollouts: list[Any] = [
        tiny_flow.rollout(4, seed=i) if flow else tiny.rollout(5 + i, seed=i) for i in range(2)
    ]
    nets = [(tiny_flow.model(seed).net if flow else tiny.net(seed, lift=1.5)) for seed in (5, 6)]
    more = {"rollouts": rollouts, "weights": published(nets[0]), "later": published(nets[1])}
    answers, later = same_bits(elsewhere, "teacher", part, told(kind, student, flows), more)
    assert len(answers) == 2
    assert answers == later


@pytest.mark.parametrize("kind", LEARNERS)
def test_learners(elsewhere: ProcessPoolExecutor, student: str, flows: dict[str, str], kind: str) -> None:
    flow = kind == "flow"
    part = build(
        "learners",
        {"kind": kind, "model": flows["student"] if flow else student, **LEARNERS[kind]},
        "learner",
    )
    rollouts: list[Any] = [
        tiny_flow.rollout(4, seed=i) if flow else tiny.rollout(5 + i, seed=i) for i in range(3)
    ]
    attempts, objectives = alone.with_targets(rollouts)
    context = told(kind, student, flows, name="learner")
    _, _, (version, _), (one, again) = same_bits(
        elsewhere, "learner", part, context, {"attempts": attempts, "objectives": objectives}
    )
    assert version == "2"
    assert one == again


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards(elsewhere: ProcessPoolExecutor, student: str, kind: str) -> None:
    part = build("rewards", {"kind": kind, **REWARDS[kind]}, "reward")
    prompt = texts(1)[0]
    made = [
        dataclasses.replace(tiny.rollout(3, seed=i), prompt=prompt, text=text)
        for i, text in enumerate(alone.as_texts(prompt))
    ]
    right, wrong = same_bits(
        elsewhere, "reward", part, told("hf", student, {}), {"group": [Attempt(rollout) for rollout in made]}
    )
    assert (right[1]["value"], wrong[1]["value"]) == ("1.0", "0.0")


@pytest.mark.parametrize("kind", TASKS)
def test_tasks(elsewhere: ProcessPoolExecutor, tmp_path: Path, kind: str) -> None:
    if kind == "verifiers":
        pytest.skip("contract/test_verifiers.py opens it, where its package is installed")
    rows = [
        f'{{"question": "{n} + 1?", "prompt": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(40)
    ]
    for name in ("rows", "train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    fields = {key: str(tmp_path / value) if key == "path" else value for key, value in TASKS[kind].items()}
    part = build("tasks", {"kind": kind, **fields}, "task")
    if stored := part.stored_answers:
        asked = islice(stored.task.prompts("train", 5), 3)
        lines = [json.dumps(stored.line(prompt, ["a", "b", "c", "d"])) + "\n" for prompt in asked]
        stored.path.write_text("".join(lines))
    same_bits(
        elsewhere, "task", part, None, {"made": alone.as_pictures if kind == "glyphs" else alone.as_texts}
    )


@pytest.mark.parametrize("recipe", recipe_names())
def test_contexts_and_parts_of_shipped_recipes_are_pickled(recipe: str) -> None:
    cfg = load_recipe(recipe)
    contexts = [part_context(cfg, WANTS, name, Path("run")) for name in ("learner", "sampler", *cfg.teachers)]
    assert pickle.loads(pickle.dumps(contexts)) == contexts
    parts = [cfg.learner, cfg.sampler, cfg.task, *cfg.teachers.values()]
    assert pickle.loads(pickle.dumps(parts)) == parts


def test_what_differs_is_seen() -> None:
    """The comparison is by bits: a value of another sign, type or place is another one."""
    one, other = np.zeros(2, np.float32), np.asarray([0.0, -0.0], np.float32)
    assert alone.plain(one) != alone.plain(other)
    assert alone.plain(one) != alone.plain(one.astype(np.float64))
    assert alone.plain({"a": 1}) != alone.plain({"b": 1})
