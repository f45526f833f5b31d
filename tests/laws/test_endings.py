"""Law 12. A run ends: if an attempt raises, is cancelled or times out, the run ends with that exception and
leaves no task behind.

This holds at every stage of an attempt, at every staleness, and whether or not the loop waits for attempts in
flight (for an evaluation, for extrapolation). The other attempts of the step wait for the failed one in a
cohort that is never complete.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from reflux import loop
from reflux.errors import DataError
from reflux.loop import train
from reflux.training import Options, Run
from reflux.types import Reward

CHAT = {"kind": "outside:Chat"}
# A limit far above the duration of a run here, so that a hanging run fails.
HANGS_S = 30.0
SETTLES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "an evaluation": {
        "eval_every": 1,
        "evals__peek": {"kind": "outside:Peek", "weight": "model.norm.weight"},
    },
    "a jump": {"extrapolation": {"kind": "outside:Jump", "at": 1, "score": "minus_kl"}},
}


class Broken(Exception):
    """The exception that a part raises."""


class Fault:
    """Ends the attempt at the first prompt of optimiser step `step`, at `stage`, in the way `how`."""

    def __init__(self, how: type[BaseException], stage: str, step: int):
        self.how, self.stage, self.number, self.met = how, stage, f"train-{2 * step}", 0

    def here(self, stage: str, prompt: str) -> bool:
        found = stage == self.stage and prompt == self.number
        self.met += found
        return found

    async def end(self) -> None:
        if self.how is TimeoutError:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        self.end_at_once()
        await asyncio.sleep(0)

    def end_at_once(self) -> None:
        if self.how is asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
        else:
            raise self.how


class Unjudging:
    """Rewards that grade nothing."""

    async def judge(self, group: Any) -> None:
        for attempt in group:
            attempt.reward = Reward(None)

    async def learn(self, groups: Any, step_context: Any) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def break_parts(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Patch the parts of the run, with the fault before each stage."""
    plain_open, plain_write = loop.open_parts, Run.write

    @asynccontextmanager
    async def open_parts(*args: Any) -> AsyncIterator[Any]:
        async with plain_open(*args) as (learner, sampler, _, teachers, extrapolation):
            rewards: Any = Unjudging()
            sample, judge, score = sampler.sample, rewards.judge, teachers.score

            async def faulty_sample(prompt: Any, n: int, draw: Any) -> Any:
                if draw.purpose == "train" and fault.here("sample", prompt.id):
                    await fault.end()
                return await sample(prompt, n, draw)

            async def faulty_judge(group: Any) -> Any:
                if fault.here("reward", group[0].rollout.prompt.id):
                    await fault.end()
                return await judge(group)

            async def faulty_score(groups: Any, *more: Any, **named: Any) -> Any:
                if len(groups) == 1 and fault.here("score", groups[0][0].rollout.prompt.id):
                    await fault.end()
                return await score(groups, *more, **named)

            sampler.sample, rewards.judge, teachers.score = faulty_sample, faulty_judge, faulty_score
            yield learner, sampler, rewards, teachers, extrapolation

    def faulty_write(self: Run, ask: Any, group: Any) -> None:
        if fault.here("write", group[0].rollout.prompt.id):
            fault.end_at_once()
        plain_write(self, ask, group)

    monkeypatch.setattr(loop, "open_parts", open_parts)
    monkeypatch.setattr(Run, "write", faulty_write)


def ending_of(run: Callable[[], Coroutine[Any, Any, Any]], folder: Path) -> BaseException:
    """The exception that a run ends with. Asserts that the run ends, no task is left, no exception was lost,
    and its folder is unlocked.
    """
    told: list[Any] = []

    async def main() -> BaseException:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        task = asyncio.ensure_future(run())
        await asyncio.wait([task], timeout=HANGS_S)
        assert task.done(), "the run hangs"
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            task.result()
        except BaseException as error:
            return error.with_traceback(None)
        raise AssertionError("the run did not fail")

    error = asyncio.run(main())
    gc.collect()
    assert told == []
    return error


@pytest.mark.parametrize("settle", SETTLES)
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("stage", ["sample", "reward", "score", "write"])
@pytest.mark.parametrize("how", [Broken, asyncio.CancelledError, TimeoutError], ids=lambda how: how.__name__)
def test_an_attempt_that_ends_badly_ends_the_run_with_its_exception(
    monkeypatch: pytest.MonkeyPatch,
    student: str,
    teacher: str,
    tmp_path: Path,
    how: type[BaseException],
    stage: str,
    max_staleness: int,
    settle: str,
) -> None:
    # with staleness, this step is in flight while the first step is trained on
    fault = Fault(how, stage, max(1, max_staleness))
    break_parts(monkeypatch, fault)
    cfg = tiny.config(
        "opd",
        student,
        teacher,
        task=CHAT,
        steps=4,
        prompts_per_step=2,
        max_staleness=max_staleness,
        **SETTLES[settle],
    )
    error = ending_of(lambda: train(cfg, Options(tmp_path / "run")), tmp_path / "run")
    assert type(error) is how
    assert fault.met == 1


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_attempt_that_leaves_its_cohort_by_its_own_limit_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, student: str, teacher: str, tmp_path: Path, max_staleness: int
) -> None:
    """Its request has been made, and the sibling that it waits for never makes one."""
    plain_open = loop.open_parts

    @asynccontextmanager
    async def open_parts(*args: Any) -> AsyncIterator[Any]:
        async with plain_open(*args) as parts:
            sampler = parts[1]
            sample = sampler.sample

            async def impatient(prompt: Any, n: int, draw: Any) -> Any:
                if prompt.id == "train-3":
                    await asyncio.Event().wait()
                async with asyncio.timeout(0.05 if prompt.id == "train-2" else None):
                    return await sample(prompt, n, draw)

            sampler.sample = impatient
            yield parts

    monkeypatch.setattr(loop, "open_parts", open_parts)
    settings = {
        "task": CHAT,
        "steps": 3,
        "prompts_per_step": 2,
        "max_staleness": max_staleness,
        **SETTLES["an evaluation"],
    }
    cfg = tiny.config("opd", student, teacher, **settings)
    assert isinstance(
        ending_of(lambda: train(cfg, Options(tmp_path / "run")), tmp_path / "run"), TimeoutError
    )


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_prompt_without_references_is_refused_before_a_run_of_sft(
    student: str, teacher: str, tmp_path: Path, max_staleness: int
) -> None:
    settings = {
        "steps": 4,
        "prompts_per_step": 2,
        "max_staleness": max_staleness,
        "eval_every": 1,
        "evals__accuracy": {"problems": 2},
    }
    cfg = tiny.config("sft", student, teacher, task={"kind": "outside:Patchy", "odd": 3}, **settings)
    with pytest.raises(DataError, match=r"training prompts have none \(the first is train-3\)"):
        asyncio.run(train(cfg, Options(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_prompt_that_no_teacher_serves_ends_a_run(
    student: str, teacher: str, tmp_path: Path, max_staleness: int
) -> None:
    task = {"kind": "outside:Patchy", "odd": 3, "tells_routes": False}
    settings = {
        "steps": 4,
        "prompts_per_step": 2,
        "max_staleness": max_staleness,
        "teachers__main__routes": ["even", "odd"],
    }
    cfg = tiny.config("opd", student, teacher, task=task, **settings, **SETTLES["an evaluation"])
    error = ending_of(lambda: train(cfg, Options(tmp_path / "run")), tmp_path / "run")
    assert isinstance(error, DataError)
    assert "prompt train-3 has the route 'nowhere'" in str(error)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_stop_leaves_nothing_in_flight(
    monkeypatch: pytest.MonkeyPatch, student: str, teacher: str, tmp_path: Path, max_staleness: int
) -> None:
    """The model calls that the attempts in flight had begun end too."""
    from reflux.errors import Stopped

    advance = Run.advance

    def stop(self: Run, *args: Any) -> None:
        advance(self, *args)
        self.stopping = True

    monkeypatch.setattr(Run, "advance", stop)
    cfg = tiny.config(
        "opd", student, teacher, task=CHAT, steps=9, prompts_per_step=3, max_staleness=max_staleness
    )
    assert isinstance(ending_of(lambda: train(cfg, Options(tmp_path / "run")), tmp_path / "run"), Stopped)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_that_is_cancelled_from_outside_leaves_nothing(
    student: str, teacher: str, tmp_path: Path, max_staleness: int
) -> None:
    cfg = tiny.config(
        "opd", student, teacher, task=CHAT, steps=500, prompts_per_step=3, max_staleness=max_staleness
    )

    async def cancelled() -> None:
        task = asyncio.ensure_future(train(cfg, Options(tmp_path / "run")))
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    assert isinstance(ending_of(cancelled, tmp_path / "run"), asyncio.CancelledError)
