"""More prompts a step than the data has lines: every occurrence is an attempt of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

import tiny
from laws.test_resume import stop_after, told
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.evals.evaluation import Evaluation
from reflux.runtime.occurrences import numbered
from reflux.runtime.pipeline import Ask, Pipeline
from reflux.runtime.positions import Positions
from reflux.training import Options, Run
from reflux.types import Attempt, Prompt
from tiny import same

SETTINGS = {"steps": 3, "group_size": 2, "save_every": 1}


def keys(*ids: str) -> list[str]:
    return [prompt.key for prompt in numbered(Prompt(id, ()) for id in ids)]


def test_later_occurrences_have_a_number_and_no_key_occurs_twice() -> None:
    assert keys("a", "b") == ["a", "b"]
    assert keys("a", "b", "a", "b", "a") == ["a", "b", "a#2", "b#2", "a#3"]
    assert keys("a", "a", "a#2", "a") == ["a", "a#3", "a#2", "a#4"]
    assert keys("a#2", "a", "a#2", "a") == ["a#2", "a", "a#2#2", "a#3"]
    assert keys("a", "a", "a#2", "a#2", "a#2#2") == ["a", "a#3", "a#2", "a#2#3", "a#2#2"]
    assert [prompt.id for prompt in numbered([Prompt("a", ())] * 3)] == ["a"] * 3


def test_each_step_counts_anew_and_a_refresh_keeps_the_numbers() -> None:
    asked: list[tuple[int, str]] = []

    async def attempt(ask: Ask) -> Any:
        asked.append((ask.step, ask.prompt.key))
        return []

    async def main() -> None:
        prompts = cycle([Prompt("a", ()), Prompt("b", ())])
        stream = Pipeline(
            prompts, attempt, positions=Positions.after(4), steps=6, per_step=3, max_staleness=1, ahead=1
        )
        await anext(stream)
        stream.refresh()
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert asked == [(4, "a"), (4, "b"), (4, "a#2"), *2 * [(5, "b"), (5, "a"), (5, "b#2")]]


def two_lines(folder: Path) -> dict[str, Any]:
    path = folder / "two.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{k}+1?", "answer": k + 1, "references": ["5"]}) + "\n" for k in (1, 2)
        )
    )
    return {"kind": "jsonl", "path": str(path), "validation": 0.0}


def sampled(done: Any) -> dict[tuple[int, str, int], Any]:
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    found = {(row["step"], row["prompt"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_no_two_attempts_of_a_run_are_the_same(
    tiny_run: Callable[..., Any], tmp_path: Path, max_staleness: int
) -> None:
    settings = {**SETTINGS, "task": two_lines(tmp_path), "max_staleness": max_staleness}
    few, many = (tiny_run("vopd", **settings, prompts_per_step=count) for count in (2, 5))
    found = sampled(many)
    assert len(found) == 3 * 5 * 2
    for step in (1, 2, 3):
        said = {tuple(row["tokens"]) for key, row in found.items() if key[0] == step}
        assert len(said) == 10
    # The first occurrence keeps the random numbers that it has alone.
    first = {key: row["tokens"] for key, row in sampled(few).items() if key[0] == 1}
    assert {key: found[key]["tokens"] for key in first} == first
    learnt = {
        (row["step"], row["prompt"], row["sample"])
        for row in many.rows("attempts")
        if row["kind"] == "learned"
    }
    assert learnt == found.keys()


def test_stopping_and_resuming_changes_nothing(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "task": two_lines(tmp_path), "prompts_per_step": 5}
    whole = tiny_run("peers", **settings)
    stop_after(1, tmp_path / "stopped", tiny.config("peers", student, teacher, **settings))
    resumed = tiny_run("peers", **settings, out=tmp_path / "stopped", resume=True)
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)


def test_an_attempt_at_a_further_occurrence_is_not_counted_as_discarded(tmp_path: Path) -> None:
    run = Run.open(load_recipe("vopd", {"steps": 1}), Requirements(), Options(tmp_path / "run"))
    with closing(run):
        for prompt in numbered([Prompt("a", tiny.rollout(3).messages)] * 2):
            group = [Attempt(replace(tiny.rollout(3), prompt=prompt))]
            run.write(Ask(prompt, 0, 0, 2, 0, False), group)
        assert run.landed.take([group]).sampled == 0
        first = Prompt("a", prompt.messages)
        again = [Attempt(replace(tiny.rollout(3), prompt=first))]
        run.write(Ask(first, 0, 0, 2, 0, False), again)
        assert run.landed.take([again]).sampled == 3


def test_an_evaluation_with_one_prompt_twice_asks_two_different_keys() -> None:
    class Sampler:
        async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Any:
            return [prompt.key] * n

    context = tiny.context(Requirements())
    evaluation = Evaluation(context, None, None, Sampler())  # type: ignore[arg-type]
    groups = evaluation.groups([Prompt("a", ()), Prompt("a", ())], 2, SamplingParams(0, "eval", 3))
    assert asyncio.run(groups) == [["a", "a"], ["a#2", "a#2"]]
