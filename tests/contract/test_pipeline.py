"""The pipeline alone, with a scripted attempt: what is started when, in which order it comes, and how it
ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, nullcontext
from itertools import count, islice
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.runtime.pipeline import Ask, Pipeline
from reflux.runtime.positions import Positions
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

    async def __call__(self, ask: Ask) -> Any:
        prompt, step = ask.prompt, ask.step
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
    ahead: int | None = None,
    order: Literal["ready", "strict"] = "ready",
    positions: Positions = Positions.after(0),
    end: int | None = None,
) -> Pipeline:
    return Pipeline(
        prompts(end),
        script,
        positions=positions,
        steps=positions.consumed + steps,
        per_step=per_step,
        max_staleness=max_staleness,
        ahead=max_staleness if ahead is None else ahead,
        order=order,
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
    found = asyncio.run(consume(stream(script, steps=2, positions=Positions.after(5)), script))
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

    async def stubborn(ask: Ask) -> Group:
        prompt = ask.prompt
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
        pipe = Pipeline(
            prompts(), stubborn, positions=Positions.after(0), steps=4, per_step=1, max_staleness=1, ahead=1
        )
        ahead = pipe.__aiter__()
        await anext(ahead)
        # in flight and not landed, as behind a slow model
        pipe._start()
        await asyncio.sleep(0)
        pipe.refresh()
        assert [groups async for groups in ahead] == [[[]]] * 3

    asyncio.run(main())
    assert ended


# --- the window


def test_a_slow_group_delays_nobody_within_the_window_and_everybody_at_its_end() -> None:
    """At most 2 steps late: 1 step ahead, and a window of 2."""

    async def main() -> None:
        script = Script()
        pipe = stream(script, steps=8, max_staleness=3, ahead=1)
        script.instant = False
        found: list[list[Any]] = []

        async def step() -> None:
            script.land(*(key for key in script.started if key != (0, "1") and not script.gate(key).done()))
            found.append([group[0][:2] for group in await anext(pipe)])

        first = asyncio.ensure_future(anext(pipe))
        await asyncio.sleep(0.01)
        script.land((0, "0"))
        # without any other group it has to wait
        await asyncio.sleep(0.01)
        assert not first.done()
        script.land((1, "2"))
        found.append([group[0][:2] for group in await first])
        for _ in range(2):
            ask = asyncio.ensure_future(step())
            await asyncio.sleep(0.01)
            script.land(*(key for key in script.started if key != (0, "1") and not script.gate(key).done()))
            await asyncio.wait_for(ask, 1)
        assert found == [[(0, "0"), (1, "2")], [(1, "3"), (2, "4")], [(2, "5"), (3, "6")]]
        last = asyncio.ensure_future(step())
        await asyncio.sleep(0.01)
        script.land(*(key for key in script.started if key != (0, "1") and not script.gate(key).done()))
        await asyncio.sleep(0.01)
        # all others have landed, and this is the last step that may take it
        assert pipe.in_flight == 1
        assert not last.done()
        script.land((0, "1"))
        await asyncio.wait_for(last, 1)
        assert found[3] == [(0, "1"), (3, "7")]
        await pipe.aclose()

    asyncio.run(main())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_bound_holds_and_every_prompt_is_used_once_whatever_is_slow(data: st.DataObject) -> None:
    """Groups land in any order, one at a time and only where the consumer waits; some steps refresh, and
    sometimes another pipeline goes on from the positions, as after a resume.
    """
    max_staleness = data.draw(st.integers(0, 4))
    ahead = data.draw(st.integers(0, max_staleness))
    per_step, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    order = data.draw(st.sampled_from(["ready", "strict"]))

    async def main() -> None:
        script, used = Script(instant=False), []
        positions, done = Positions.after(0), 0
        while done < steps:
            kept = Positions.from_state(json.loads(json.dumps(positions.state())))
            assert kept == positions
            script = Script(instant=False)
            script.version = done
            pipe = Pipeline(
                islice(prompts(), positions.first * per_step, None),
                script,
                positions=kept,
                steps=steps,
                per_step=per_step,
                max_staleness=max_staleness,
                ahead=ahead,
                order=order,
            )
            while done < steps:
                ask = asyncio.ensure_future(anext(pipe))
                for _ in range(3):
                    await asyncio.sleep(0)
                while not ask.done():
                    open_ = [key for key, gate in script.gates.items() if not gate.done()]
                    assert len(open_) <= (ahead + 1) * per_step
                    script.land(data.draw(st.sampled_from(sorted(open_))))
                    for _ in range(4):
                        await asyncio.sleep(0)
                groups = [group[0] for group in await ask]
                assert groups == sorted(groups, key=lambda group: (group[0], int(group[1])))
                assert all(0 <= done - version <= max_staleness for _, _, version in groups)
                if order == "strict":
                    assert [step for step, _, _ in groups] == [done] * per_step
                used += [int(prompt) for _, prompt, _ in groups]
                done += 1
                script.version = done
                what = data.draw(st.sampled_from(["go on", "go on", "refresh", "resume"]))
                if what == "refresh":
                    script.gates = {key: gate for key, gate in script.gates.items() if gate.done()}
                    pipe.refresh()
                    await pipe._clear_dropped()
                    script.gates.clear()
                elif what == "resume":
                    break
            positions = pipe.positions
            await pipe.aclose()
        assert sorted(used) == list(range(steps * per_step))
        assert positions == Positions(steps, steps)

    asyncio.run(main())


def test_settle_lets_attempts_finish_and_starts_none() -> None:
    async def main() -> None:
        script = Script()
        pipe = stream(script, steps=6, max_staleness=2)

        async def then(done: int) -> None:
            # what was asked for begins
            await asyncio.sleep(0)
            before = len(script.started)
            await pipe.settle()
            assert pipe.in_flight == 0
            assert len(script.started) == before

        found = await consume(pipe, script, then)
        assert len(found) == 6

    asyncio.run(main())


@pytest.mark.parametrize(("order", "steps"), [("strict", [1, 2]), ("ready", [])])
def test_an_exception_surfaces_at_the_yield_of_its_step_or_of_the_next(order: Any, steps: list[int]) -> None:
    script = Script()
    script.fails = {(2, "5")}
    seen: list[int] = []

    async def then(done: int) -> None:
        seen.append(done)
        # the failing attempt has long ended
        await asyncio.sleep(0.01)

    with pytest.raises(KeyError, match=r"attempt \(2, '5'\)"):
        asyncio.run(consume(stream(script, steps=6, max_staleness=3, order=order), script, then))
    assert seen == steps


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

    async def __call__(self, ask: Ask) -> Any:
        prompt, step = ask.prompt, ask.step
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
@pytest.mark.parametrize("order", ["ready", "strict"])
def test_a_cohort_that_is_never_whole_ends_with_the_error(
    order: Any, ending: BaseException, max_staleness: int, then: str
) -> None:
    """Where its siblings would wait for ever, at the yield of its step or, with order "ready", of the step
    after its end, whatever the consumer does before.
    """

    async def main() -> list[int]:
        script = Deadlock({(2, "5"): ending})
        pipe = stream(script, steps=5, max_staleness=max_staleness, order=order)
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

    early = order == "ready" and max_staleness == 2
    assert asyncio.run(main()) == ([1] if early else [1, 2])


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

    async def attempt(ask: Ask) -> Group:
        prompt = ask.prompt
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
            Pipeline(
                prompts(),
                attempt,
                positions=Positions.after(0),
                steps=1,
                per_step=4,
                max_staleness=0,
                ahead=0,
            )
        ) as pipe:
            with pytest.raises(KeyError, match="1"):
                await anext(pipe)

    asyncio.run(main())
    assert cleaned == ["0", "3"]


def test_an_error_of_an_attempt_that_is_being_dropped_is_not_lost() -> None:
    async def attempt(ask: Ask) -> Group:
        if ask.step == 0:
            return []
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("the file could not be closed") from None
        return []

    async def main() -> None:
        async with aclosing(
            Pipeline(
                prompts(),
                attempt,
                positions=Positions.after(0),
                steps=3,
                per_step=1,
                max_staleness=1,
                ahead=1,
            )
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

        async def stubborn(ask: Ask) -> Group:
            prompt, step = ask.prompt, ask.step
            try:
                await asyncio.sleep(0 if step == 0 else 60)
            finally:
                await asyncio.sleep(0.01)
                gone.append(prompt.id)
            return []

        async with aclosing(
            Pipeline(
                prompts(),
                stubborn,
                positions=Positions.after(0),
                steps=4,
                per_step=1,
                max_staleness=1,
                ahead=1,
            )
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
