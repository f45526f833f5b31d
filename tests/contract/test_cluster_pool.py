"""Who gets work when actors end, and how Ray is joined and left. No cluster is started here:
`tests/laws/test_cluster_runs.py` has a real one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from reflux.cluster.actors import Reply
from reflux.cluster.base import Bundle
from reflux.cluster.ray import Ray
from reflux.cluster.wire import packed
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError, ModelError, ServerError
from reflux.runtime.services import Services

if TYPE_CHECKING:
    from reflux.cluster.pool import Call

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

BUNDLES = [Bundle("sampler", "", index, 1.0, 0.0) for index in range(2)]


class Actor:
    """Answers with its number, or with the exception at the head of its list."""

    def __init__(self, number: int, raises: list[Exception]):
        self.number, self.raises, self.prepared, self.calls = number, raises, False, 0

    async def work(self) -> Reply:
        assert self.prepared
        self.calls += 1
        await asyncio.sleep(0)
        if self.raises:
            raise self.raises.pop(0)
        return Reply(packed(self.number), {}, ())


class Scene:
    """A pool whose actors raise what is written for them. raises: for each actor, in the order of starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, raises: list[list[Exception]], **options: Any):
        from reflux.cluster import pool

        self.actors: list[Actor] = []
        self.ended: list[Actor] = []
        self.heard = tiny.Heard()
        monkeypatch.setattr(pool, "end", self.ended.append)

        def start(bundle: Bundle) -> Actor:
            number = len(self.actors)
            self.actors.append(Actor(number, raises[number] if number < len(raises) else []))
            return self.actors[-1]

        async def prepare(actor: Actor) -> Reply:
            for _ in range(5):
                await asyncio.sleep(0)
            if actor.raises and str(actor.raises[0]) == "at once":
                raise actor.raises.pop(0)
            actor.prepared = True
            return Reply(packed(f"open {actor.number}"), {}, ("a slow tokenizer",))

        self.opening: list[Call] = [prepare]

        student = load_recipe("full").learner.student
        services = Services(student, listener=self.heard)
        self.pool = pool.Pool(
            BUNDLES, start, lambda: self.opening, services, **{"restarts": 2, "timeout_s": 9.0, **options}
        )

    def does(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def all_of_it() -> Any:
            self.opened = [reply.result.value() for reply in await self.pool.open()]
            return await work()

        return asyncio.run(all_of_it())


def gone(text: str = "it ended") -> Exception:
    return ray.exceptions.RayActorError(error_msg=text)


async def asked(scene: Scene, size: int = 1) -> int:
    return (await scene.pool.least(size, lambda actor: actor.work())).result.value()


def test_work_goes_to_the_actor_with_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [])

    async def work() -> list[int]:
        return await asyncio.gather(asked(scene, 5), asked(scene, 3), asked(scene, 3), asked(scene, 2))

    assert scene.does(work) == [0, 1, 1, 0]
    assert [member.outstanding for member in scene.pool.members] == [0, 0]


def test_a_lost_actor_is_replaced_prepared_and_does_the_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls notice it, and it is replaced once. A call of all actors gets one answer of each."""
    scene = Scene(monkeypatch, [[gone(), gone()]])

    async def work() -> list[int]:
        first = await asyncio.gather(asked(scene), asked(scene), asked(scene))
        return [*first, *(each.result.value() for each in await scene.pool.each(lambda actor: actor.work()))]

    assert scene.does(work) == [2, 1, 2, 2, 1]
    assert scene.ended == [scene.actors[0]]
    replaced = "sampler actor 0 has ended and is replaced. Its work is done again."
    assert scene.heard.notes == ["a slow tokenizer", replaced]
    assert scene.opened == ["open 0", "open 1"]
    # Two calls were lost, and only they are made again.
    assert [actor.calls for actor in scene.actors] == [2, 2, 3]


def test_a_new_actor_is_given_nothing_before_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [[gone()]])

    async def work() -> list[int]:
        first = asyncio.create_task(asked(scene))
        while len(scene.actors) < 3:
            await asyncio.sleep(0)
        assert not scene.actors[2].prepared
        answers = await scene.pool.each(lambda actor: actor.work())
        return [await first, *(answer.result.value() for answer in answers)]

    assert scene.does(work) == [2, 2, 1]


def test_an_actor_that_ends_while_it_is_prepared_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [[gone("at once")], [], [gone("at once")]])
    assert scene.does(lambda: asked(scene)) == 3
    assert [actor.number for actor in scene.ended] == [0, 2]
    assert len([note for note in scene.heard.notes if "is replaced" in note]) == 2


def test_after_too_many_the_run_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [[gone()], [], [gone()], [gone("the last of it")]])
    with pytest.raises(ServerError, match=r"sampler actor 0 has ended 3 times .* the last of it"):
        scene.does(lambda: asked(scene))


def test_an_answer_forgives_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [[gone()], [], [], []], restarts=1)

    async def work() -> list[int]:
        first = await asked(scene)
        scene.actors[first].raises.append(gone())
        return [first, await asked(scene)]

    assert scene.does(work) == [2, 3]


def test_one_that_is_never_ready_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [], timeout_s=0.01)

    async def never(actor: Actor) -> None:
        await asyncio.Event().wait()

    scene.opening.append(never)
    with pytest.raises(ServerError, match=r"was not ready after 0\.01 s"):
        scene.does(lambda: asked(scene))


def test_an_error_of_the_part_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ModelError("too long")
    scene = Scene(monkeypatch, [[ray.exceptions.RayTaskError("work", "trace", cause)]])
    with pytest.raises(ModelError, match="too long"):
        scene.does(lambda: asked(scene))
    assert scene.ended == []


# --- Ray itself


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    from reflux.cluster.placing import refuse_too_much

    bundles = Ray(samplers=2, teachers={"main": 1}, gpus_per_teacher=2).bundles
    refuse_too_much(bundles, [{"CPU": 4, "GPU": 2}])
    with pytest.raises(
        ConfigError, match=r"1 x learner, 2 x sampler, 1 x teacher main need 4 CPUs and 2 GPUs, and"
    ):
        refuse_too_much(bundles, [{"CPU": 2.0}, {"CPU": 1.0}])
    with pytest.raises(ConfigError, match="one teacher main needs 1 CPUs and 2 GPUs on one machine"):
        refuse_too_much(bundles, [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}])


@pytest.mark.parametrize(("address", "given"), [(None, "local"), ("auto", "auto")])
def test_a_cluster_is_left_and_the_handler_of_sigterm_stays(
    monkeypatch: pytest.MonkeyPatch, address: str | None, given: str
) -> None:
    from reflux.cluster.placing import connected

    calls: list[Any] = []

    def init(**options: Any) -> None:
        calls.append((options["address"], options["include_dashboard"], options["object_store_memory"]))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    before = signal.getsignal(signal.SIGTERM)

    def failing() -> None:
        with connected(Ray(samplers=1, address=address)):
            assert signal.getsignal(signal.SIGTERM) == before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert calls == [(given, False if address is None else None, None), "shutdown"]


def test_a_cluster_that_this_process_is_part_of_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.cluster.placing import connected

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("it was shut down"))
    with connected(Ray(samplers=1)):
        pass


def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.cluster.placing import connected

    def init(**options: Any) -> None:
        raise ConnectionError("nobody there\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ConfigError, match=r"no cluster of Ray at HOST:1: nobody there\."),
        connected(Ray(samplers=1, address="HOST:1")),
    ):
        pass


def test_ranks_of_torchrun_and_of_a_cluster_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.cluster.learner_ranks import environment, started

    monkeypatch.setenv("WORLD_SIZE", "2")
    bundles = Ray(learner_ranks=2).bundles
    learner = load_recipe("full").learner
    with (
        pytest.raises(ConfigError, match="torchrun has started ranks already"),
        started(learner, bundles, print, 9.0),
    ):
        pass
    with environment({"WORLD_SIZE": "3", "REFLUX_NEW": "1"}):
        assert (os.environ["WORLD_SIZE"], os.environ["REFLUX_NEW"]) == ("3", "1")
    assert (os.environ["WORLD_SIZE"], "REFLUX_NEW" in os.environ) == ("2", False)


@pytest.mark.parametrize(("failed", "ends"), [(True, []), (False, [2])])
def test_the_error_of_rank_0_is_heard_before_the_end_of_the_others(
    monkeypatch: pytest.MonkeyPatch, failed: bool, ends: list[int]
) -> None:
    """A cluster ends the other ranks while rank 0 still tells of its own error."""
    from reflux.learners import rank_group

    def closed(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("connection closed")

    seen: list[int] = []
    monkeypatch.setattr(rank_group.dist, "recv", closed)
    monkeypatch.setattr(os, "_exit", seen.append)
    group = rank_group.RankGroup.__new__(rank_group.RankGroup)
    group.rank, group.size, group.busy, group.failed, group._goodbyes = 0, 2, failed, False, None  # type: ignore[assignment]
    if failed:
        group.leave()
    group._watch(1)
    assert seen == ends
