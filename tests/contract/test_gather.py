"""Requests of one cohort become one call in any order of arrival; cancelled requests leave no trace."""

from __future__ import annotations

import asyncio

import pytest

from reflux.runtime.cohorts import Gather


class Scribe:
    def __init__(self, delay_s: float = 0.0, fails: bool = False):
        self.calls: list[list[str]] = []
        self.stopped: list[list[str]] = []
        self.delay_s, self.fails, self.running = delay_s, fails, 0

    async def __call__(self, items: list[str]) -> list[str]:
        self.running += 1
        # one cohort at a time
        assert self.running == 1
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            # as a model call ends at its next token
            await asyncio.sleep(0.01)
            self.stopped.append(items)
            raise
        finally:
            self.running -= 1
        self.calls.append(items)
        if self.fails:
            raise OSError("the model is gone")
        return [item.upper() for item in items]


def test_one_call_per_cohort_in_order_of_place() -> None:
    async def main() -> None:
        scribe = Scribe()
        gather = Gather(scribe)
        asks = [gather.ask(step, 3, place, f"{place}{step}") for place in "cab" for step in (1, 0)]
        assert await asyncio.gather(*asks) == ["C1", "C0", "A1", "A0", "B1", "B0"]
        assert sorted(scribe.calls) == [["a0", "b0", "c0"], ["a1", "b1", "c1"]]

    asyncio.run(main())


def test_a_cohort_of_one_is_answered_at_once() -> None:
    assert asyncio.run(Gather(Scribe()).ask(0, 1, "a", "x")) == "X"


def test_cancelled_requests_leave_their_cohort_and_can_be_asked_again() -> None:
    async def main() -> None:
        scribe = Scribe()
        gather = Gather(scribe)
        waiting = [asyncio.ensure_future(gather.ask(7, 3, place, place)) for place in "ab"]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert scribe.calls == []
        again = await asyncio.wait_for(
            asyncio.gather(*(gather.ask(7, 3, place, place) for place in "abc")), 1
        )
        assert again == ["A", "B", "C"]
        assert scribe.calls == [["a", "b", "c"]]

    asyncio.run(main())


def test_a_call_in_progress_is_finished_for_those_that_still_wait() -> None:
    async def main() -> None:
        scribe = Scribe(delay_s=0.05)
        gather = Gather(scribe)
        first, second = (asyncio.ensure_future(gather.ask(0, 2, place, place)) for place in "ab")
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == "B"
        await asyncio.wait([first])
        assert first.cancelled()
        assert (scribe.calls, scribe.stopped) == ([["a", "b"]], [])

    asyncio.run(main())


def test_a_call_that_nobody_waits_for_is_stopped() -> None:
    async def main() -> None:
        scribe = Scribe(delay_s=0.05)
        gather = Gather(scribe)
        first = [asyncio.ensure_future(gather.ask(0, 2, place, place)) for place in "ab"]
        await asyncio.sleep(0.01)
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        second = await asyncio.wait_for(
            asyncio.gather(*(gather.ask(0, 2, place, place * 2) for place in "ab")), 1
        )
        assert second == ["AA", "BB"]
        # never at the same time
        assert (scribe.stopped, scribe.calls) == ([["a", "b"]], [["aa", "bb"]])

    asyncio.run(main())


def test_a_cohort_cancelled_before_its_turn_is_not_computed() -> None:
    async def main() -> None:
        scribe = Scribe(delay_s=0.03)
        gather = Gather(scribe)
        first, second = (
            asyncio.ensure_future(gather.ask(0, 1, "a", "a")),
            asyncio.ensure_future(gather.ask(1, 1, "b", "b")),
        )
        await asyncio.sleep(0.01)
        second.cancel()
        assert await first == "A"
        await asyncio.sleep(0.05)
        assert scribe.calls == [["a"]]

    asyncio.run(main())


@pytest.mark.parametrize("rest", ["waiting", "later"])
def test_a_request_that_leaves_takes_its_cohort_with_it(rest: str) -> None:
    """By its own time limit, and its task lives on. The cohort is never complete, so it is not waited for."""

    async def main() -> None:
        scribe = Scribe()
        gather = Gather(scribe)

        async def impatient() -> str:
            try:
                async with asyncio.timeout(0.01):
                    return await gather.ask(7, 3, "a", "a")
            except TimeoutError:
                await asyncio.sleep(0.2)
                return "gave up"

        first = asyncio.ensure_future(impatient())
        await asyncio.sleep(0 if rest == "waiting" else 0.05)
        others = [
            asyncio.ensure_future(gather.ask(7, 3, place, place))
            for place in "bc"[: 1 if rest == "waiting" else 2]
        ]
        await asyncio.wait(others, timeout=5)
        assert all(task.cancelled() for task in others)
        assert await first == "gave up"
        assert scribe.calls == []
        # no other cohort is touched
        assert await gather.ask(8, 1, "d", "d") == "D"

    asyncio.run(main())


def test_a_cohort_whose_requests_were_all_cancelled_can_be_asked_again_in_any_order() -> None:
    async def main() -> None:
        scribe = Scribe()
        gather = Gather(scribe)
        for _ in range(2):
            waiting = [asyncio.ensure_future(gather.ask(7, 3, place, place)) for place in "ab"]
            await asyncio.sleep(0)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        again = await asyncio.wait_for(
            asyncio.gather(*(gather.ask(7, 3, place, place) for place in "cba")), 1
        )
        assert again == ["C", "B", "A"]
        assert scribe.calls == [["a", "b", "c"]]

    asyncio.run(main())


def test_a_cancelled_request_is_gone_when_its_call_is_over() -> None:
    """However often it is cancelled; then no call is alive either, not even one that never began."""

    async def main() -> None:
        scribe = Scribe(delay_s=0.05)
        gather = Gather(scribe)
        asks = [asyncio.ensure_future(gather.ask(step, 2, place, place)) for step in (0, 1) for place in "ab"]
        await asyncio.sleep(0.01)
        for _ in range(3):
            for task in asks:
                task.cancel()
            await asyncio.sleep(0.001)
        assert scribe.running == 1
        await asyncio.wait(asks)
        assert (scribe.stopped, scribe.calls) == ([["a", "b"]], [])
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_answer(error: type[BaseException]) -> None:
    """It passes the requests by: they are cancelled, and the loop stops with it once."""
    ended: list[str] = []

    async def call(items: list[str]) -> list[str]:
        raise error

    async def main() -> None:
        gather = Gather(call)

        async def ask(place: str) -> None:
            try:
                await gather.ask(0, 2, place, place)
            except asyncio.CancelledError:
                ended.append(place)
                raise

        await asyncio.gather(ask("a"), ask("b"))

    with pytest.raises(error):
        asyncio.run(main())
    assert ended == ["a", "b"]


def test_a_failing_call_fails_all_its_requests_and_no_other() -> None:
    async def main() -> None:
        scribe = Scribe(fails=True)
        gather = Gather(scribe)
        failed = await asyncio.gather(
            *(gather.ask(0, 2, place, place) for place in "ab"), return_exceptions=True
        )
        assert all(isinstance(error, OSError) for error in failed)
        scribe.fails = False
        assert await gather.ask(1, 1, "c", "c") == "C"

    asyncio.run(main())


def test_a_call_that_answers_too_few_is_an_error_and_hangs_no_one() -> None:
    async def short(items: list[str]) -> list[str]:
        return items[:1]

    async def main() -> None:
        gather = Gather(short)
        asks = asyncio.gather(*(gather.ask(0, 2, place, place) for place in "ab"), return_exceptions=True)
        answers = await asyncio.wait_for(asks, 1)
        assert any(isinstance(answer, Exception) for answer in answers)

    asyncio.run(main())
