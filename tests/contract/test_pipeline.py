"""The pipeline alone, with a scripted attempt: what is started when, in which order it comes, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import pytest

from reflux.pipeline import Pipeline
from reflux.types import Group, Prompt


def prompts(end: int | None = None) -> Iterator[Prompt]:
    return (Prompt(str(i), ()) for i in (count() if end is None else range(end)))


class Script:
    """An attempt that lands when it is told to; `version` is what a sampler would hold."""

    def __init__(self, instant: bool = True):
        self.instant, self.version = instant, 0
        self.started: list[tuple[int, str]] = []
        self.cancelled: list[tuple[int, str]] = []
        self.gates: dict[tuple[int, str], asyncio.Future[None]] = {}
        self.fails: set[tuple[int, str]] = set()

    async def __call__(self, prompt: Prompt, step: int) -> Any:
        key, version = (step, prompt.id), self.version
        self.started.append(key)
        try:
            await (asyncio.sleep(0) if self.instant else self.gate(key))
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        if key in self.fails:
            raise KeyError(f"attempt {key}")
        return [(step, prompt.id, version)]

    def gate(self, key: tuple[int, str]) -> asyncio.Future[None]:
        return self.gates.setdefault(key, asyncio.get_running_loop().create_future())

    def land(self, *keys: tuple[int, str]) -> None:
        for key in keys:
            self.gate(key).set_result(None)


def stream(script: Script, *, steps: int = 4, per_step: int = 2, max_lag: int = 0, first_step: int = 0, end: int | None = None) -> Pipeline:
    return Pipeline(prompts(end), script, first_step=first_step, steps=steps, per_step=per_step, max_lag=max_lag)


async def consume(pipe: Pipeline, script: Script, then: Callable[[int], Awaitable[None]] | None = None) -> list[list[Any]]:
    """One new version a step, as the loop makes them."""
    found = []
    async for groups in pipe:
        found.append([group[0] for group in groups])
        if then:
            await then(len(found))
        script.version += 1
    return found


@pytest.mark.parametrize("max_lag", [0, 1, 2, 5])
def test_steps_and_prompts_come_in_order_and_lag_is_bounded_and_reached(max_lag: int) -> None:
    script = Script()
    found = asyncio.run(consume(stream(script, steps=8, max_lag=max_lag), script, lambda done: asyncio.sleep(0.001)))
    assert [[(step, prompt) for step, prompt, _ in groups] for groups in found] == [
        [(s, str(2 * s)), (s, str(2 * s + 1))] for s in range(8)
    ]
    lags = [step - version for groups in found for step, _, version in groups]
    assert min(lags) >= 0
    assert max(lags) == max_lag


def test_first_step_names_the_steps() -> None:
    script = Script()
    found = asyncio.run(consume(stream(script, steps=2, first_step=5), script))
    assert [step for groups in found for step, _, _ in groups] == [5, 5, 6, 6]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_nothing_is_started_for_steps_that_will_not_run(steps: int) -> None:
    script = Script()
    asyncio.run(consume(stream(script, steps=steps, max_lag=4), script))
    assert len(script.started) == 2 * steps


def test_never_more_in_flight_than_the_bound() -> None:
    async def main() -> None:
        script = Script(instant=False)
        pipe = stream(script, steps=6, max_lag=2)
        ahead = pipe.__aiter__()
        first = asyncio.ensure_future(anext(ahead))
        await asyncio.sleep(0.01)
        assert pipe.in_flight == 6
        script.land((0, "0"), (0, "1"))
        await first
        await asyncio.sleep(0.01)
        assert pipe.in_flight == 4  # nothing is started while the consumer is at work
        assert len(script.started) == 6
        await ahead.aclose()

    asyncio.run(main())


def test_groups_come_in_prompt_order_however_they_land() -> None:
    async def main() -> None:
        script = Script(instant=False)
        ahead = stream(script, steps=1, per_step=3).__aiter__()
        step = asyncio.ensure_future(anext(ahead))
        await asyncio.sleep(0.01)
        for key in ((0, "2"), (0, "0"), (0, "1")):
            script.land(key)
            await asyncio.sleep(0.01)
        assert [group[0][1] for group in await step] == ["0", "1", "2"]

    asyncio.run(main())


@pytest.mark.parametrize("landed", [True, False])
def test_refresh_asks_the_same_prompts_again_under_the_weights_of_now(landed: bool) -> None:
    """Also where what is in flight has landed already, and where it has not."""

    async def main() -> None:
        script = Script(instant=landed)
        pipe = stream(script, steps=5, max_lag=2)
        if not landed:
            asyncio.get_running_loop().call_later(0.01, script.land, (0, "0"), (0, "1"))

        async def then(done: int) -> None:
            await asyncio.sleep(0.01)
            if done == 1:
                pipe.refresh()
                script.instant = True

        found = await consume(pipe, script, then)
        assert [prompt for groups in found for _, prompt, _ in groups] == [str(i) for i in range(10)]
        assert [step - version for step, _, version in found[1]] == [0, 0]
        assert found[2][0] == (2, "4", 1)
        assert {key for key in script.started if script.started.count(key) == 2} == {(1, "2"), (1, "3"), (2, "4"), (2, "5")}
        assert len(script.cancelled) == (0 if landed else 4)

    asyncio.run(main())


def test_a_dropped_attempt_is_gone_before_its_prompt_is_asked_again() -> None:
    """It may need a moment to end; the two must never meet in one batch."""
    alive: list[str] = []
    ended: list[str] = []

    async def stubborn(prompt: Prompt, step: int) -> Group:
        assert prompt.id not in alive
        alive.append(prompt.id)
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)  # a model call that is finished, not interrupted
            ended.append(prompt.id)
            raise
        finally:
            alive.remove(prompt.id)
        return []

    async def main() -> None:
        pipe = Pipeline(prompts(), stubborn, first_step=0, steps=4, per_step=1, max_lag=1)
        ahead = pipe.__aiter__()
        await anext(ahead)
        pipe._start(upto=2)  # in flight and not landed, as behind a slow model
        await asyncio.sleep(0)
        pipe.refresh()
        assert [groups async for groups in ahead] == [[[]]] * 3

    asyncio.run(main())
    assert ended


def test_settle_lets_attempts_finish_and_starts_none() -> None:
    async def main() -> None:
        script = Script()
        pipe = stream(script, steps=6, max_lag=2)

        async def then(done: int) -> None:
            before = len(script.started)
            await pipe.settle()
            assert pipe.in_flight == 0
            assert len(script.started) == before

        found = await consume(pipe, script, then)
        assert len(found) == 6

    asyncio.run(main())


def test_an_exception_surfaces_at_the_yield_of_its_step() -> None:
    script = Script()
    script.fails = {(2, "5")}
    seen: list[int] = []

    async def then(done: int) -> None:
        seen.append(done)
        await asyncio.sleep(0.01)  # the failing attempt has long ended

    with pytest.raises(KeyError, match=r"attempt \(2, '5'\)"):
        asyncio.run(consume(stream(script, steps=6, max_lag=3), script, then))
    assert seen == [1, 2]


def test_an_exception_does_not_wait_for_its_siblings_and_cancels_the_rest() -> None:
    async def main() -> None:
        script = Script(instant=False)
        script.fails = {(0, "1")}
        step = asyncio.ensure_future(anext(stream(script, steps=3, per_step=3, max_lag=1).__aiter__()))
        await asyncio.sleep(0.01)
        script.land((0, "1"))
        with pytest.raises(KeyError):
            await asyncio.wait_for(step, 1)
        assert sorted(script.cancelled) == sorted(set(script.started) - {(0, "1")})

    asyncio.run(main())


def test_closing_cancels_what_is_in_flight() -> None:
    async def main() -> None:
        script = Script(instant=False)
        ahead = stream(script, steps=4, max_lag=1).__aiter__()
        first = asyncio.ensure_future(anext(ahead))
        await asyncio.sleep(0.01)
        script.land((0, "0"), (0, "1"))
        await first
        await ahead.aclose()
        assert script.cancelled == [(1, "2"), (1, "3")]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_training_prompts_that_end_are_refused() -> None:
    script = Script()
    with pytest.raises(ValueError, match="training prompts must not end"):
        asyncio.run(consume(stream(script, steps=3, per_step=2, end=3), script))
