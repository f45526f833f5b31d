"""The pipeline alone, with a scripted attempt: what is started when, in which order it comes, and how it
ends.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, nullcontext
from itertools import count
from typing import Any

import pytest

from reflux.runtime.pipeline import Pipeline
from reflux.runtime.together import together
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


def stream(
    script: Script,
    *,
    steps: int = 4,
    per_step: int = 2,
    max_staleness: int = 0,
    first_step: int = 0,
    end: int | None = None,
) -> Pipeline:
    return Pipeline(
        prompts(end),
        script,
        first_step=first_step,
        steps=steps,
        per_step=per_step,
        max_staleness=max_staleness,
    )


async def consume(
    pipe: Pipeline, script: Script, then: Callable[[int], Awaitable[None]] | None = None
) -> list[list[Any]]:
    """One new version a step, as the loop makes them."""
    found = []
    async with aclosing(pipe):
        async for groups in pipe:
            found.append([group[0] for group in groups])
            if then:
                await then(len(found))
            script.version += 1
    return found


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_steps_and_prompts_come_in_order_and_lag_is_bounded_and_reached(max_staleness: int) -> None:
    script = Script()
    found = asyncio.run(
        consume(
            stream(script, steps=8, max_staleness=max_staleness), script, lambda done: asyncio.sleep(0.001)
        )
    )
    assert [[(step, prompt) for step, prompt, _ in groups] for groups in found] == [
        [(s, str(2 * s)), (s, str(2 * s + 1))] for s in range(8)
    ]
    stalenesses = [step - version for groups in found for step, _, version in groups]
    assert min(stalenesses) >= 0
    assert max(stalenesses) == max_staleness


def test_first_step_names_the_steps() -> None:
    script = Script()
    found = asyncio.run(consume(stream(script, steps=2, first_step=5), script))
    assert [step for groups in found for step, _, _ in groups] == [5, 5, 6, 6]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_nothing_is_started_for_steps_that_will_not_run(steps: int) -> None:
    script = Script()
    asyncio.run(consume(stream(script, steps=steps, max_staleness=4), script))
    assert len(script.started) == 2 * steps


def test_never_more_in_flight_than_the_bound() -> None:
    async def main() -> None:
        script = Script(instant=False)
        pipe = stream(script, steps=6, max_staleness=2)
        ahead = pipe.__aiter__()
        first = asyncio.ensure_future(anext(ahead))
        await asyncio.sleep(0.01)
        assert pipe.in_flight == 6
        script.land((0, "0"), (0, "1"))
        await first
        await asyncio.sleep(0.01)
        # nothing is started while the consumer is at work
        assert pipe.in_flight == 4
        assert len(script.started) == 6
        await ahead.aclose()

    asyncio.run(main())


def test_groups_come_in_prompt_order_however_they_land() -> None:
    async def main() -> None:
        script = Script(instant=False)
        step = asyncio.ensure_future(anext(stream(script, steps=1, per_step=3)))
        await asyncio.sleep(0.01)
        for key in ((0, "2"), (0, "0"), (0, "1")):
            script.land(key)
            await asyncio.sleep(0.01)
        landed: list[Any] = await step
        assert [group[0][1] for group in landed] == ["0", "1", "2"]

    asyncio.run(main())


@pytest.mark.parametrize("landed", [True, False])
def test_refresh_asks_the_same_prompts_again_under_the_weights_of_now(landed: bool) -> None:
    """Also where what is in flight has landed already, and where it has not."""

    async def main() -> None:
        script = Script(instant=landed)
        pipe = stream(script, steps=5, max_staleness=2)
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
        assert {key for key in script.started if script.started.count(key) == 2} == {
            (1, "2"),
            (1, "3"),
            (2, "4"),
            (2, "5"),
        }
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
            # a model call that is finished, not interrupted
            await asyncio.sleep(0.02)
            ended.append(prompt.id)
            raise
        finally:
            alive.remove(prompt.id)
        return []

    async def main() -> None:
        pipe = Pipeline(prompts(), stubborn, first_step=0, steps=4, per_step=1, max_staleness=1)
        ahead = pipe.__aiter__()
        await anext(ahead)
        # in flight and not landed, as behind a slow model
        pipe._start(upto=2)
        await asyncio.sleep(0)
        pipe.refresh()
        assert [groups async for groups in ahead] == [[[]]] * 3

    asyncio.run(main())
    assert ended


def test_settle_lets_attempts_finish_and_starts_none() -> None:
    async def main() -> None:
        script = Script()
        pipe = stream(script, steps=6, max_staleness=2)

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
        # the failing attempt has long ended
        await asyncio.sleep(0.01)

    with pytest.raises(KeyError, match=r"attempt \(2, '5'\)"):
        asyncio.run(consume(stream(script, steps=6, max_staleness=3), script, then))
    assert seen == [1, 2]


def test_an_exception_does_not_wait_for_its_siblings() -> None:
    async def main() -> None:
        script = Script(instant=False)
        script.fails = {(0, "1")}
        async with aclosing(stream(script, steps=3, per_step=3, max_staleness=1)) as pipe:
            step = asyncio.ensure_future(anext(pipe))
            await asyncio.sleep(0.01)
            script.land((0, "1"))
            with pytest.raises(KeyError):
                await asyncio.wait_for(step, 1)
            # its own siblings; the next step goes on until the pipeline is closed
            assert script.cancelled == [(0, "0"), (0, "2")]
        assert sorted(script.cancelled) == sorted(set(script.started) - {(0, "1")})
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


class Deadlock(Script):
    """Attempts that wait for their siblings, as those of a cohort do. `fails` says how an attempt ends that
    never asks.
    """

    def __init__(self, ends: Mapping[tuple[int, str], BaseException]):
        super().__init__()
        self.ends = ends

    async def __call__(self, prompt: Prompt, step: int) -> Any:
        key = (step, prompt.id)
        self.started.append(key)
        if key in self.ends:
            await asyncio.sleep(0.001)
            raise self.ends[key]
        if step in {step for step, _ in self.ends}:
            await asyncio.Event().wait()
        return [(*key, self.version)]


ENDINGS = [KeyError("broken"), TimeoutError(), asyncio.CancelledError()]


@pytest.mark.parametrize("then", ["nothing", "settle", "settle and refresh", "refresh"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: type(ending).__name__)
def test_a_cohort_that_is_never_whole_ends_with_the_error(
    ending: BaseException, max_staleness: int, then: str
) -> None:
    """Where its siblings would wait for ever, at the yield of its step, whatever the consumer does before."""

    async def main() -> list[int]:
        script = Deadlock({(2, "5"): ending})
        pipe = stream(script, steps=5, max_staleness=max_staleness)
        seen: list[int] = []

        async def after(done: int) -> None:
            seen.append(done)
            if "settle" in then:
                await pipe.settle()
            else:
                await asyncio.sleep(0.01)
            if "refresh" in then and done == 1:
                pipe.refresh()

        task = asyncio.ensure_future(consume(pipe, script, after))
        await asyncio.wait([task], timeout=5)
        assert task.done(), "it hangs"
        with pytest.raises(type(ending)):
            task.result()
        assert len(asyncio.all_tasks()) == 1
        return seen

    assert asyncio.run(main()) == [1, 2]


def test_an_error_comes_before_its_siblings_cancellations_and_of_several_the_first_in_prompt_order() -> None:
    async def ends(ends: Mapping[tuple[int, str], BaseException]) -> str:
        script = Deadlock(ends)
        with pytest.raises(BaseException) as caught:
            await asyncio.wait_for(consume(stream(script, per_step=4), script), 5)
        return repr(caught.value)

    both = {(0, "2"): KeyError("two"), (0, "1"): KeyError("one")}
    assert asyncio.run(ends(both)) == "KeyError('one')"
    assert (
        asyncio.run(ends({(0, "0"): asyncio.CancelledError(), (0, "2"): KeyError("two")}))
        == "KeyError('two')"
    )


def test_no_error_is_left_for_the_garbage_collector_to_tell() -> None:
    """Of several errors one is raised; the others were looked at."""
    told: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        script = Deadlock({(step, str(2 * step + i)): KeyError(step) for step in (0, 1) for i in (0, 1)})
        with pytest.raises(KeyError):
            await consume(stream(script, max_staleness=1), script)

    asyncio.run(main())
    gc.collect()
    assert told == []


def test_a_sibling_is_cancelled_once_so_that_it_can_clean_up() -> None:
    cleaned: list[str] = []

    async def attempt(prompt: Prompt, step: int) -> Group:
        if prompt.id in ("1", "2"):
            raise KeyError(prompt.id)
        try:
            await asyncio.Event().wait()
        finally:
            # the first is gone while the last still cleans up
            await asyncio.sleep(0.01 * (1 + int(prompt.id)))
            cleaned.append(prompt.id)
        return []

    async def main() -> None:
        async with aclosing(
            Pipeline(prompts(), attempt, first_step=0, steps=1, per_step=4, max_staleness=0)
        ) as pipe:
            with pytest.raises(KeyError, match="1"):
                await anext(pipe)

    asyncio.run(main())
    assert cleaned == ["0", "3"]


def test_an_error_of_an_attempt_that_is_being_dropped_is_not_lost() -> None:
    async def attempt(prompt: Prompt, step: int) -> Group:
        if step == 0:
            return []
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("the file could not be closed") from None
        return []

    async def main() -> None:
        async with aclosing(
            Pipeline(prompts(), attempt, first_step=0, steps=3, per_step=1, max_staleness=1)
        ) as pipe:
            await anext(pipe)
            await asyncio.sleep(0)
            pipe.refresh()
            with pytest.raises(OSError, match="could not be closed"):
                await anext(pipe)

    asyncio.run(main())


@pytest.mark.parametrize("failing", [False, True])
def test_closing_cancels_what_is_in_flight(failing: bool) -> None:
    """Also what was dropped before, and what cannot end at once."""

    async def main() -> None:
        script = Script(instant=False)
        pipe = stream(script, steps=4, max_staleness=2)
        with pytest.raises(ZeroDivisionError) if failing else nullcontext():
            async with aclosing(pipe):
                first = asyncio.ensure_future(anext(pipe))
                await asyncio.sleep(0.01)
                script.land((0, "0"), (0, "1"))
                await first
                if failing:
                    raise ZeroDivisionError
        assert script.cancelled == [(1, "2"), (1, "3"), (2, "4"), (2, "5")]
        assert len(asyncio.all_tasks()) == 1
        assert [groups async for groups in pipe] == []

    asyncio.run(main())


def test_closing_waits_for_what_was_dropped() -> None:
    async def main() -> None:
        gone: list[str] = []

        async def stubborn(prompt: Prompt, step: int) -> Group:
            try:
                await asyncio.sleep(0 if step == 0 else 60)
            finally:
                await asyncio.sleep(0.01)
                gone.append(prompt.id)
            return []

        async with aclosing(
            Pipeline(prompts(), stubborn, first_step=0, steps=4, per_step=1, max_staleness=1)
        ) as pipe:
            await anext(pipe)
            pipe.refresh()
        assert gone == ["0", "1"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_together_is_the_results_in_order_or_the_first_error_and_leaves_nothing() -> None:
    async def one(answer: int, ends: BaseException | None = None) -> int:
        await asyncio.sleep(0.001 * (5 - answer))
        if ends:
            raise ends
        return answer

    async def main() -> None:
        assert await together([]) == []
        assert await together(one(i) for i in range(4)) == [0, 1, 2, 3]
        with pytest.raises(KeyError):
            await together([one(-5000), one(1, KeyError()), one(-5000)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(together(one(-5000) for _ in range(3)), 0.01)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_training_prompts_that_end_are_refused() -> None:
    script = Script()
    with pytest.raises(ValueError, match="training prompts must not end"):
        asyncio.run(consume(stream(script, steps=3, per_step=2, end=3), script))
