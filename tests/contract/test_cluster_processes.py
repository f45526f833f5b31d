"""What runs in the processes of a cluster, and how they are placed, awaited and ended. No cluster is started
here: `tests/laws/test_cluster_runs.py` has a real one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from reflux.cluster import actors
from reflux.cluster.ray import Ray
from reflux.cluster.wire import packed
from reflux.config.recipe import load_recipe
from reflux.config.step_context import SamplingParams
from reflux.errors import ConfigError, ModelError, ServerError
from reflux.runtime.cohorts import Gather
from reflux.types import Prompt

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

# --- the processes of parts


class Batching:
    """A part whose prompts wait for all others of their step, as those of a model in this process do."""

    overlaps = False

    def __init__(self, error: Exception | None = None):
        self.error, self.closed = error, False
        self.batches: list[list[str]] = []
        self._gather: Gather[str, str] = Gather(self._answer)

    @asynccontextmanager
    async def open(self, context: Any, services: Any) -> AsyncIterator[Batching]:
        if self.error:
            raise self.error
        services.listener.noted("opened")
        yield self
        self.closed = True

    async def _answer(self, items: list[str]) -> list[str]:
        await asyncio.sleep(0)
        self.batches.append(items)
        return items

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> str:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.key, prompt.id)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of torch and of the environment are those of this process, and stay."""
    monkeypatch.setattr(actors, "prepare_torch", lambda threads, deterministic: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")


def test_two_shares_of_one_step_are_not_mixed_and_the_part_is_closed(quiet: None) -> None:
    part = Batching()
    actor = actors.SamplerActor(part, tiny.context(), 1.0)
    draw = SamplingParams(0, "train", 10, cohort=3)

    async def all_of_it() -> list[Any]:
        opened = await actor.open()
        assert (opened.result.value(), opened.notes) == (None, ("opened",))
        shares = [[(Prompt(name, ()), 1, draw) for name in names] for names in (("a", "b"), ("c",))]
        replies = await asyncio.gather(*(actor.sample(packed(share)) for share in shares))
        assert not part.closed
        await actor.close()
        return [reply.result.value() for reply in replies]

    assert asyncio.run(all_of_it()) == [["a", "b"], ["c"]]
    assert part.batches == [["a", "b"], ["c"]]
    assert part.closed


def test_an_error_of_opening_is_that_of_the_part(quiet: None) -> None:
    actor = actors.PartActor(Batching(ModelError("too large")), tiny.context(), 1.0)
    with pytest.raises(ModelError, match="too large"):
        asyncio.run(actor.open())


def test_a_process_without_gpus_sees_none(quiet: None) -> None:
    actors.PartActor(Batching(), tiny.context(), 0.5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    actors.RankActor(load_recipe("full").learner, 0.0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


# --- their places


class Done:
    """A call whose result is there."""

    def __init__(self, value: Any):
        self.value = value

    def remote(self, *arguments: Any) -> Any:
        async def result() -> Any:
            return self.value

        return result()


@pytest.mark.parametrize("placed", [True, False])
def test_actors_have_a_folder_each_and_end_with_the_block(
    placed: bool, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    from reflux.cluster import placing, pool

    started: list[tuple[type, Path]] = []
    ended: list[Any] = []

    def place(cluster: Any, actor: type, bundle: Any, part: Any, context: Any) -> Any:
        started.append((actor, context.folder))
        return SimpleNamespace(open=Done(actors.Reply(packed(None), {}, ())), close=Done(None))

    monkeypatch.setattr(placing.RayCluster, "place", place)
    monkeypatch.setattr(pool, "end", ended.append)
    # What is not named stays in the process of the loop.
    cfg = Ray(samplers=2) if placed else Ray(teachers={"main": 1})
    part: Any = Batching()
    part.precision = "auto"
    services = tiny.services()

    async def failing() -> None:
        cluster = placing.RayCluster(cfg, None, services)
        async with cluster.sampler(part, tiny.context(folder=Path("run")), services) as sampler:
            assert (sampler is part) is not placed
            assert ended == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(failing())
    folders = [Path("run/0"), Path("run/1")] if placed else []
    assert started == [(actors.SamplerActor, folder) for folder in folders]
    assert len(ended) == len(folders)


class Nodes:
    """Ray with one machine of 4 CPUs that answers, and one that does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready: bool):
        from reflux.cluster import placing

        self.asked: list[Any] = []
        self.removed: list[Any] = []
        nodes = [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 4.0), (False, 64.0))]
        group = SimpleNamespace(wait=lambda timeout_s: ready)

        def placement_group(bundles: Any, strategy: str) -> Any:
            self.asked += [bundles, strategy]
            return group

        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "HERE")
        monkeypatch.setattr(placing, "placement_group", placement_group)
        monkeypatch.setattr(placing, "remove_placement_group", self.removed.append)


def test_the_process_of_the_loop_is_reserved_here_and_all_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reflux.cluster.placing import reserved_for

    nodes = Nodes(monkeypatch, ready=True)
    with reserved_for(Ray(samplers=1, strategy="SPREAD")) as reserved:
        assert nodes.removed == []
    assert nodes.asked == [[{"CPU": 1.0, "node:HERE": 0.001}, {"CPU": 1.0}], "SPREAD"]
    assert nodes.removed == [reserved]


def test_what_the_machines_lack_is_refused_before_anything_is_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that has gone does not count."""
    from reflux.cluster.placing import reserved_for

    nodes = Nodes(monkeypatch, ready=True)
    with (
        pytest.raises(ConfigError, match=r"need 9 CPUs and 0 GPUs, and the cluster has 4 CPUs"),
        reserved_for(Ray(samplers=8)),
    ):
        pass
    assert nodes.asked == []


def test_bundles_that_are_not_placed_in_time_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.cluster.placing import reserved_for

    nodes = Nodes(monkeypatch, ready=False)
    with (
        pytest.raises(ConfigError, match=r"in 5 s\. The cluster has 4 CPUs and 0 GPUs; free are 1 CPUs"),
        reserved_for(Ray(samplers=1, start_timeout_s=5)),
    ):
        pass
    assert len(nodes.removed) == 1


# --- ranks of the learner


class Rank:
    """A started rank: its name stands for every reference to a result."""

    def __init__(self, name: str):
        self.__ray_ready__ = self.follow = self.gpus = SimpleNamespace(remote=lambda *arguments: name)


def test_the_process_of_the_loop_sees_the_gpus_of_its_bundle(
    monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    from reflux.cluster import learner_ranks

    ended: list[Any] = []
    holder = Rank("holder")
    monkeypatch.setattr(ray, "get", lambda reference, timeout: ["5", "7"])
    monkeypatch.setattr(learner_ranks, "end", ended.append)
    cfg = Ray(samplers=1, gpus_per_rank=2)
    learner = load_recipe("full").learner
    with learner_ranks.started(learner, cfg.bundles, lambda actor, bundle: holder, 9.0):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
        assert ended == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert ended == [holder]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.GetTimeoutError("late"), r"a rank of the learner was not ready after 9 s"),
        (ray.exceptions.RayActorError(error_msg="gone\nmore"), r"did not start\. Ray says: gone Its own"),
    ],
)
def test_a_rank_that_does_not_start_ends_the_run(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reflux.cluster import learner_ranks

    def get(references: Any, timeout: float) -> Any:
        assert (references, timeout) == (["a", "a"], 9.0)
        raise error

    ended: list[Any] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(learner_ranks, "end", ended.append)
    bundles = Ray(learner_ranks=3).bundles
    with (
        pytest.raises(ServerError, match=words),
        learner_ranks.started(load_recipe("full").learner, bundles, lambda *arguments: Rank("a"), 9.0),
    ):
        pass
    assert len(ended) == 2


@pytest.mark.parametrize("noticed_s", [0.0, 60.0])
def test_a_rank_that_is_lost_before_there_is_a_group_ends_the_process(
    noticed_s: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the run ends first, with an error of its own."""
    from reflux.cluster import learner_ranks

    exits: list[int] = []
    asked, said = threading.Event(), threading.Event()

    def get(reference: Any) -> None:
        if reference == "second":
            asked.set()
            raise ray.exceptions.RayActorError(error_msg="gone")

    def leave(code: int) -> None:
        exits.append(code)
        said.set()

    monkeypatch.setattr(ray, "wait", lambda waiting, timeout: (waiting, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(learner_ranks, "_NOTICED_S", noticed_s)
    with learner_ranks._watched(["first", "second"]):
        assert asked.wait(20)
        if not noticed_s:
            assert said.wait(20)
    told = " ".join(capsys.readouterr().err.split())
    assert exits == ([2] if not noticed_s else [])
    assert ("rank 2 of 3 has ended, and the run ends with it." in told) is (not noticed_s)
