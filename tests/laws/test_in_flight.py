"""Law 7 with work in flight. What was sampled and not trained on is used again after a resume, once, within
the bound of staleness; nothing is counted twice, and nothing is lost without a word.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import tiny_flow
from laws.kill_often import SETTINGS
from laws.test_resume import StopAfter
from reflux.errors import Stopped
from reflux.loop import train
from reflux.runtime.pipeline import Ask, Pipeline
from reflux.runtime.positions import Positions
from reflux.storage import files, rollout_files
from reflux.storage.in_flight import InFlight
from reflux.training import Options
from reflux.types import Attempt, FlowRollout, Prompt, Reward, SampledTarget, TokenRollout, TopKTarget

HERE = Path(__file__).parent


# --- files of groups


def equal(one: Any, other: Any) -> None:
    """Every field of two rollouts or targets, with its type."""
    assert type(one) is type(other)
    for entry in fields(one):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(mine, theirs)
        elif isinstance(mine, TopKTarget | SampledTarget):
            equal(mine, theirs)
        else:
            assert mine == theirs, entry.name


def full_rollout() -> TokenRollout:
    """Every optional field is set."""
    listed = TopKTarget(
        teacher="behaviour",
        ids_TK=np.arange(12).reshape(4, 3),
        logp_TK=np.full((4, 3), -1.25, dtype=np.float32),
        logp_T=np.array([-0.5, -np.inf, 0.0, -2.0], dtype=np.float32),
    )
    return replace(
        tiny.rollout(4),
        version=3,
        version_T=np.array([3, 3, 4, 5]),
        logp_raw_T=np.array([-0.1, -0.2, -0.3, -1e-30], dtype=np.float32),
        behaviour=listed,
        finish="max_turns",
        spans_T2=np.arange(8).reshape(4, 2),
        special_T=np.array([False, True, False, False]),
        environment_reward=0.1 + 0.2,
        sampled_positions=17,
        drawn_positions={"main": 3},
        text='two\nlines "quoted" \U0001f600 \x00 \ud83d',
        messages=({"role": "user", "content": "é"}, {"role": "tool", "content": "1", "tool_call_id": "x"}),
    )


REWARDS = [None, Reward(1.0), Reward(None, {"style": 0.25}, "good", "timed out")]


@pytest.mark.parametrize("reward", REWARDS, ids=["none", "value", "all"])
def test_a_group_is_read_as_it_was_written(tmp_path: Path, reward: Reward | None) -> None:
    bare = tiny.rollout(2)
    short = replace(bare, behaviour=SampledTarget(teacher="behaviour", logp_T=bare.logp_T))
    group = [
        Attempt(full_rollout(), reward, asked_step=7),
        Attempt(short, asked_step=7),
        Attempt(replace(bare, finish="error"), asked_step=7),
    ]
    rollout_files.write(tmp_path / "folder" / "a.safetensors", group, {"newest": 5})
    assert rollout_files.read_told(tmp_path / "folder" / "a.safetensors") == {"newest": 5}
    again = rollout_files.read(tmp_path / "folder" / "a.safetensors", bare.prompt, 7)
    assert [(a.asked_step, a.reward) for a in again] == [(7, reward), (7, None), (7, None)]
    for one, other in zip(group, again, strict=True):
        equal(replace(one.rollout, prompt=bare.prompt), other.rollout)  # type: ignore[type-var]
    assert os.listdir(tmp_path / "folder") == ["a.safetensors"]


def test_an_image_is_read_as_it_was_written(tmp_path: Path) -> None:
    drawn = tiny_flow.rollout()
    assert isinstance(drawn, FlowRollout)
    rollout_files.write(tmp_path / "a.safetensors", [Attempt(drawn)], {})
    (again,) = rollout_files.read(tmp_path / "a.safetensors", drawn.prompt, 0)
    equal(drawn, again.rollout)


def test_a_damaged_file_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rollout_files.write(path, [Attempt(tiny.rollout(3))], {"newest": 1})
    whole = path.read_bytes()
    for content in (b"", whole[:20], b"\xff" * 100, whole[:-3]):
        path.write_bytes(content)
        assert rollout_files.read_told(path) is None
    assert rollout_files.read_told(tmp_path / "absent") is None


# --- what a resume uses


def kept(folder: Path, step: int, place: int, versions: list[int], deadline: int, **more: Any) -> Ask:
    store = InFlight(folder, lambda prompt: False, max_staleness=3)
    ask = Ask(Prompt(f"{step}-{place}", ()), step, place, 1, deadline, False)
    rollout = replace(tiny.rollout(len(versions)), version=min(versions), version_T=np.asarray(versions))
    store.keep(ask, [Attempt(replace(rollout, prompt=ask.prompt), asked_step=step)])
    return ask


def test_what_is_consumed_newer_or_too_old_is_not_used_and_is_removed(tmp_path: Path) -> None:
    positions = Positions(6, 8, {6: (1,), 7: (0, 1)})
    for step, place, versions, deadline in [
        (5, 0, [4, 5], 8),  # its block is consumed
        (6, 0, [5, 5], 8),  # its place is consumed
        (6, 1, [5, 6], 8),
        (7, 0, [6, 7], 8),  # a token of weights that are lost
        (7, 1, [2, 6], 5),  # too old for the next step
        (8, 0, [6, 6], 9),  # asked for after the checkpoint, by its weights
    ]:
        kept(tmp_path, step, place, versions, deadline)
    damaged = tmp_path / "in_flight" / "9-0.safetensors"
    damaged.write_bytes(b"half")
    (tmp_path / "in_flight" / "notes.txt").write_text("a user's file stays")
    found = InFlight(tmp_path, lambda prompt: False, max_staleness=3).find(positions, version=6)
    assert (found.finished, found.given_up) == ({(6, 1): 8, (8, 0): 9}, {})
    names = sorted(path.name for path in (tmp_path / "in_flight").iterdir())
    assert names == ["6-1.safetensors", "8-0.safetensors", "notes.txt"]
    (note,) = found.notes(positions)
    assert note == "attempts in flight: 2 finished groups are used again, and 2 begin again"


def test_a_begin_that_must_not_be_repeated_is_given_up_unless_it_was_finished(tmp_path: Path) -> None:
    store = InFlight(tmp_path, lambda prompt: prompt.id != "free", max_staleness=3)
    asks = [
        Ask(Prompt(name, ()), 4, place, 1, 7, False) for place, name in enumerate(["free", "lost", "kept"])
    ]
    for ask in asks:
        store.begin(ask)
    store.keep(asks[2], [Attempt(replace(tiny.rollout(2), prompt=asks[2].prompt), asked_step=4)])
    found = InFlight(tmp_path, lambda prompt: True, max_staleness=3).find(Positions.after(4), version=4)
    assert (found.finished, found.given_up) == ({(4, 2): 7}, {(4, 1): 7})
    # It must not begin in this process either.
    assert [store.begin(ask) for ask in asks[:2]] == [True, False]
    assert "1 groups had begun" in list(found.notes(Positions.after(4)))[1]
    lost, there = store.recall(asks[1], 2), store.recall(asks[2], 1)
    assert [(a.rollout.finish, a.rollout.length, a.rollout.sample) for a in lost] == [
        ("error", 0, 0),
        ("error", 0, 1),
    ]
    assert there[0].rollout.length == 2
    # both are consumed, and nothing is left
    store.keep(asks[1], lost)
    store.consume([lost, there])
    store.forget()
    assert [path.name for path in tmp_path.rglob("4-*")] == []


def test_given_up_groups_of_later_blocks_can_all_be_taken_in_time(tmp_path: Path) -> None:
    """Blocks that were asked for long after the checkpoint. Each step takes one of them."""
    store = InFlight(tmp_path, lambda prompt: True, max_staleness=2)
    for block in range(4, 9):
        store.begin(Ask(Prompt(str(block), ()), block, 0, 1, block + 2, False))
    store.resume(Positions.after(4), version=4)

    async def main() -> list[str]:
        async def attempt(ask: Ask) -> Any:
            return [ask.prompt.id]

        prompts = (Prompt(str(block), ()) for block in range(4, 99))
        settings = {"steps": 9, "per_step": 1, "max_staleness": 2, "ahead": 1}
        stream = Pipeline(prompts, attempt, positions=Positions.after(4), recalled=store.recalled, **settings)
        return [str(groups[0][0]) async for groups in stream]

    assert asyncio.run(main()) == ["4", "5", "6", "7", "8"]


def test_what_a_refresh_discards_does_not_come_back(tmp_path: Path) -> None:
    """Also where the run is stopped before its prompts are asked for again."""
    store = InFlight(tmp_path, lambda prompt: False, max_staleness=2)

    async def main() -> None:
        async def attempt(ask: Ask) -> Any:
            group = [Attempt(replace(tiny.rollout(2), prompt=ask.prompt), asked_step=ask.step)]
            store.keep(ask, group)
            return group

        prompts = (Prompt(str(place), ()) for place in range(9))
        settings = {"steps": 4, "per_step": 1, "max_staleness": 2, "ahead": 2}
        stream = Pipeline(prompts, attempt, positions=Positions.after(0), discard=store.discard, **settings)
        await anext(stream)
        await stream.settle()
        assert len(list((tmp_path / "in_flight").iterdir())) == 3
        stream.refresh()
        await stream.aclose()

    asyncio.run(main())
    # that of the step that is trained on stays until a checkpoint counts it
    assert [path.name for path in (tmp_path / "in_flight").iterdir()] == ["0-0.safetensors"]


def test_a_second_try_at_a_prompt_forgets_the_first(tmp_path: Path) -> None:
    ask = kept(tmp_path, 2, 0, [1, 1], 4)
    InFlight(tmp_path, lambda prompt: False, max_staleness=3).begin(ask)
    assert not list((tmp_path / "in_flight").iterdir())


# --- in runs


def attempts_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in files.read_lines(folder / "attempts.jsonl") if row["kind"] == "attempt"]


def all_used_once(folder: Path, steps: int, prompts: int, samples: int) -> None:
    rows = [*files.read_lines(folder / "attempts.jsonl")]
    for kind in ("attempt", "learned"):
        keys = Counter((row["step"], row["prompt"], row["sample"]) for row in rows if row["kind"] == kind)
        assert set(keys.values()) == {1}
        assert {key[:2] for key in keys} == {(1 + i // prompts, f"train-{i}") for i in range(steps * prompts)}
        assert len(keys) == steps * prompts * samples
    used = Counter(row["trained"] for row in rows if row["kind"] == "learned")
    assert used == dict.fromkeys(range(1, steps + 1), prompts * samples)


@pytest.mark.parametrize("order", ["ready", "strict"])
def test_a_stopped_run_uses_what_was_finished(student: str, teacher: str, tmp_path: Path, order: str) -> None:
    settings = {"steps": 8, "prompts_per_step": 2, "max_staleness": 3, "order": order, "save_every": 100}
    slow = {"kind": "outside:SlowLearner", "model": student, "lr": 1e-3}
    cfg = tiny.config("full", student, teacher, task={"kind": "outside:Chat"}, learner=slow, **settings)
    notes: list[str] = []

    class Noting(StopAfter):
        def noted(self, text: str) -> None:
            notes.append(text)

    with pytest.raises(Stopped):
        asyncio.run(train(cfg, Options(tmp_path / "run", watch=Noting(3))))
    before = {
        (row["step"], row["prompt"], row["sample"]): row["tokens"] for row in attempts_of(tmp_path / "run")
    }
    finished = len(list((tmp_path / "run" / "in_flight").glob("*.safetensors")))
    assert finished == 6
    asyncio.run(train(cfg, Options(tmp_path / "run", resume=True, watch=Noting(99))))
    assert [note for note in notes if "in flight" in note] == [
        "attempts in flight: 6 finished groups are used again, and 0 begin again"
    ]
    all_used_once(tmp_path / "run", 8, 2, cfg.group_size)
    after = {
        (row["step"], row["prompt"], row["sample"]): row["tokens"] for row in attempts_of(tmp_path / "run")
    }
    assert before.items() <= after.items()
    metrics = [*files.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert max(row["staleness_max"] for row in metrics) <= 3
    assert not (tmp_path / "run" / "in_flight").exists()


@pytest.mark.timeout(900)
def test_twenty_kills_lose_nothing_and_count_nothing_twice(
    student: str, teacher: str, tmp_path: Path
) -> None:
    """At random moments, with environments in progress, half of which must not begin twice."""
    folder = tmp_path / "run"
    command = [sys.executable, str(HERE / "kill_often.py"), student, teacher, str(folder), "20", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert (seen["orphans"], seen["last"]) == (0, 0), ended.stderr[-2000:]
    assert seen["killed"] >= 15
    all_used_once(folder, SETTINGS["steps"], SETTINGS["prompts_per_step"], SETTINGS["group_size"])
    metrics = [*files.read_lines(folder / "metrics.jsonl")]
    assert [row["step"] for row in metrics] == list(range(1, SETTINGS["steps"] + 1))
    assert max(row["staleness_max"] or 0 for row in metrics) <= SETTINGS["max_staleness"]
    notes = folder.with_suffix(".notes").read_text()
    assert "finished groups are used again" in notes
    errors = sum(row["finish"] == "error" for row in attempts_of(folder))
    assert errors == sum(row["errors"] for row in metrics)
    assert (errors > 0) == ("given up" in notes)
    assert not (folder / "in_flight").exists()
