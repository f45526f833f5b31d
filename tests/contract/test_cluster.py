"""What a cluster refuses and plans, what goes between processes, and who gets work when actors end. No
cluster is started here: `tests/laws/test_cluster_runs.py` has a real one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pickle
import re
import signal
import sys
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from reflux import checks
from reflux.cluster.actors import Answer, Noted, shares
from reflux.cluster.base import Seat
from reflux.cluster.ray import Ray
from reflux.cluster.wire import packed
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError, ModelError, ServerError, ServerRefused, StepRefused
from reflux.inspection.plan import plan
from reflux.runtime.services import Services
from reflux.types import HiddenTarget

ROOT = Path(__file__).parents[2]
CLUSTER = {"kind": "ray", "samplers": 2, "teachers": {"main": 1}}

# --- what a recipe may not ask for

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("full", {"cluster": {"kind": "ray"}}, "nothing is placed"),
    "no such teacher": ("full", {"cluster.teachers": {"mian": 1}}, "no teacher table 'mian'. It has: main"),
    "no actor": ("full", {"cluster.teachers": {"main": 0}}, "greater than or equal to 1"),
    "the student as teacher": (
        "full",
        {"teachers.main": {"kind": "self"}},
        "teacher 'main' is made from the student's own weights",
    ),
    "a served teacher": (
        "topk",
        {"teachers.main": {"kind": "vllm", "model": "m", "url": "http://localhost:1"}},
        "teacher 'main' is in a server already",
    ),
    "ranks of hf": ("full", {"cluster.learner_ranks": 2}, 'Use learner.kind = "fsdp"'),
    "references": (
        "sft",
        {"cluster": {"kind": "ray", "samplers": 1}},
        "takes its training attempts from elsewhere",
    ),
    "one server": (
        "full",
        {"sampler": {"kind": "vllm", "mode": "colocated", "max_tokens": 9}},
        'sampler.mode = "colocated" is one server',
    ),
    "a transfer between GPUs": (
        "full",
        {"sampler": {"kind": "vllm", "transfer": "nccl", "max_tokens": 9}},
        'sampler.transfer = "nccl" sends from the process of the learner',
    ),
    "more samplers than prompts": ("full", {"cluster.samplers": 5}, "each prompt goes to one sampler"),
    "more teachers than attempts": ("full", {"cluster.teachers": {"main": 5}}, "more than the attempts"),
    "one and a half": ("full", {"cluster.gpus_per_teacher": 1.5}, "whole GPUs, and not 1.5. Use 1 or 2"),
    "a store of a running cluster": (
        "full",
        {"cluster.address": "auto", "cluster.object_store_mb": 9},
        "object_store_mb is for a cluster that is started here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_is_refused_by_name(name: str, student: str, teacher: str) -> None:
    recipe, changes, words = REFUSED[name]
    whole = changes if "cluster" in changes else {"cluster": CLUSTER, **changes}
    with pytest.raises(ConfigError, match=words):
        checks.join(tiny.config(recipe, student, teacher, **whole))


def test_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="of images cannot be placed yet"):
        checks.join(load_recipe("flow", {"cluster": {"kind": "ray", "samplers": 1}}))


def test_what_fits_is_allowed(student: str, teacher: str) -> None:
    changes = {"learner.kind": "fsdp", "learner.model": student, "cluster": {**CLUSTER, "learner_ranks": 3}}
    cfg = tiny.config("full", student, teacher, **changes)
    checks.join(cfg)
    assert any("weights are sent" in text for text in checks.warnings(cfg))


def test_an_evaluation_that_loads_a_placed_teacher_is_told(student: str, teacher: str) -> None:
    changes: dict[str, Any] = {"cluster": CLUSTER, "sampler.dtype": "float32"}
    quiet = tiny.config("full", student, teacher, **changes)
    loud = tiny.config("full", student, teacher, **changes, **{"evals.teacher_accuracy": {}})
    told = [[text for text in checks.warnings(cfg) if "loads the teacher" in text] for cfg in (quiet, loud)]
    assert [len(texts) for texts in told] == [0, 1]


def test_a_recipe_without_a_cluster_has_no_such_table() -> None:
    from reflux.config.recipe import to_table

    assert "cluster" not in to_table(load_recipe("full"))
    assert isinstance(load_recipe("full", {"cluster.samplers": 2}).cluster, Ray)


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "reflux.cluster.placing", raising=False)
    cluster = Ray(samplers=1)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"):
        cluster.open(load_recipe("full").learner, Services(load_recipe("full").learner.student))


# --- the plan


def test_the_plan_says_who_holds_what_and_what_a_step_sends() -> None:
    cluster = {**CLUSTER, "gpus_per_sampler": 1, "cpus_per_teacher": 0.5}
    cfg = load_recipe("full", {"cluster": cluster, "sampler.dtype": "bfloat16"})
    found = plan(cfg)
    lines = dict(found.cluster)
    assert list(lines) == ["learner", "sampler", "teacher main", "in all", "traffic"]
    assert found.student.parameters is not None
    assert f"{16 * found.student.parameters / 1e9:.3g} GB of weights and optimiser" in lines["learner"]
    assert (
        f"2 actors, each 1 CPUs and 1 GPUs, {2 * found.student.parameters / 1e9:.3g} GB" in lines["sampler"]
    )
    assert lines["in all"].startswith("3.5 CPUs and 2 GPUs")
    shape = found.teachers["main"].shape
    assert shape is not None
    assert f"'main' sends {4 * shape.width / 1e3:.3g} kB a position" in lines["traffic"]
    assert plan(load_recipe("full")).cluster == []


def blocks() -> list[str]:
    return re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("text", blocks())
def test_the_tables_of_the_guide_fit(text: str) -> None:
    learner = {"learner.kind": "fsdp", "learner.model": "reflux:student", "learner.lr": 1e-3}
    cfg = load_recipe("full", {**tomllib.loads(text), **learner})
    checks.join(cfg)
    assert cfg.cluster is not None
    assert sum(seat.gpus for seat in cfg.cluster.seats) in (8, 32)


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """benchmarks/cluster_model.py"""
    spec = importlib.util.spec_from_file_location("cluster_model", ROOT / "benchmarks" / "cluster_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_model_of_a_step_counts_what_is_sent(model: ModuleType) -> None:
    teacher = model.MODELS["8B"]
    sizes = [model.row_bytes(teacher, gives, 4) for gives in ("hidden", "top64", "logits")]
    assert sizes == [16_384, 520, 607_744]
    rates, links, step = (
        model.Rates(100, 50, 25),
        model.Links(card=1000, copies=500, call_s=0.5),
        model.Step(800, 200),
    )
    found = model.seconds(model.Split(4, 2, 1, 2), rates, links, step, sent_bytes=1000, row=5)
    assert (found.sample_s, found.score_s, found.learn_s) == (2, 20, 40)
    # packed once, and sent to one machine; targets over the card, and unpacked; five actors, asked twice
    assert (found.sync_s, found.targets_s, found.calls_s) == (3, 12, 5)
    assert found.one_after_another == 82
    assert (found.overlapped, found.slowest) == (52, "learn")
    # The targets go on to the other ranks.
    assert model.seconds(model.Split(4, 2, 2, 2), rates, links, step, 1000, 5).targets_s == 24


def test_the_model_tries_splits_of_the_whole_cluster(model: ModuleType) -> None:
    tried = list(model.splits(32, 4, 3))
    assert tried
    for each in tried:
        assert each.samplers + each.teachers + each.ranks == 32
        assert each.samplers >= 1
        assert each.teachers % 4 == 0
        assert each.ranks >= 3


# --- values on their way


def test_tensors_and_arrays_arrive_as_they_were_in_memory_of_their_own() -> None:
    whole = torch.randn(50, 8)
    sent = {
        "view": whole[3:5],
        "narrow": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "array": np.arange(6).reshape(2, 3),
        "target": HiddenTarget(teacher="main", h_TH=torch.randn(4, 8), head="teachers.main"),
        "text": "x",
    }
    on_its_way = packed(sent)
    # Only the rows of the view, and no array inside the pickle.
    assert sum(each.nbytes for each in on_its_way.arrays) < whole.nbytes
    again = packed(on_its_way.value()).value()
    for key in ("view", "narrow", "scalar", "none"):
        assert torch.equal(again[key], sent[key])
        assert again[key].dtype == sent[key].dtype  # type: ignore[attr-defined]
    assert torch.equal(again["target"].h_TH, sent["target"].h_TH)  # type: ignore[attr-defined]
    again["array"][0, 0] = 9
    again["view"].zero_()
    assert on_its_way.value()["array"][0, 0] == 0
    assert torch.equal(on_its_way.value()["view"], whole[3:5])


@pytest.mark.parametrize("error", [ServerRefused("no", 400, "why"), StepRefused("no", "nan", [None])])
def test_errors_with_fields_arrive_as_they_were(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_shares_are_level_and_none_is_empty() -> None:
    assert shares([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert shares([1], 3) == [[0]]
    assert sorted(index for share in shares([3] * 7, 3) for index in share) == list(range(7))


def test_messages_are_given_once() -> None:
    noted = Noted()
    noted.noted("a")
    assert (noted.take(), noted.take()) == (("a",), ())


# --- who works when actors end


ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

SEATS = [Seat("sampler", "", index, 1.0, 0.0) for index in range(2)]


class Actor:
    """Answers with its number, or with the exception at the head of its list."""

    def __init__(self, number: int, raises: list[Exception]):
        self.number, self.raises, self.prepared = number, raises, False

    async def work(self) -> Answer:
        await asyncio.sleep(0)
        if self.raises:
            raise self.raises.pop(0)
        assert self.prepared
        return Answer(packed(self.number), {}, ())


class Scene:
    """A pool whose actors raise what is written for them. raises: for each actor, in the order of starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, raises: list[list[Exception]], **options: Any):
        from reflux.cluster import pool

        self.actors: list[Actor] = []
        self.ended: list[Actor] = []
        self.heard = tiny.Heard()
        monkeypatch.setattr(pool, "end", self.ended.append)

        def start(seat: Seat) -> Actor:
            number = len(self.actors)
            self.actors.append(Actor(number, raises[number] if number < len(raises) else []))
            return self.actors[-1]

        async def prepare(actor: Actor) -> None:
            await asyncio.sleep(0)
            if actor.raises and str(actor.raises[0]) == "at once":
                raise actor.raises.pop(0)
            actor.prepared = True

        student = load_recipe("full").learner.student
        services = Services(student, listener=self.heard)
        self.pool = pool.Pool(
            SEATS, start, prepare, services, **{"restarts": 2, "patience_s": 9.0, **options}
        )

    def does(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def all_of_it() -> Any:
            await self.pool.prepare()
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
    """Two calls notice it, and it is replaced once."""
    scene = Scene(monkeypatch, [[gone(), gone()]])

    async def work() -> list[int]:
        return [answer.result.value() for answer in await scene.pool.each(lambda actor: actor.work())] + [
            *(await asyncio.gather(asked(scene), asked(scene)))
        ]

    assert scene.does(work) == [2, 1, 2, 1]
    assert scene.ended == [scene.actors[0]]
    assert scene.heard.notes == ["sampler actor 0 has ended and is replaced. Its work is done again."]
    assert scene.pool.replaced == 1


def test_an_actor_that_ends_while_it_is_prepared_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [[gone("at once")], [], [gone("at once")]])
    assert scene.does(lambda: asked(scene)) == 3
    assert [actor.number for actor in scene.ended] == [0, 2]


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
    scene = Scene(monkeypatch, [], patience_s=0.01)

    async def never(actor: Actor) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(scene.pool, "_prepare", never)
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

    seats = Ray(samplers=2, teachers={"main": 1}, gpus_per_teacher=2).seats
    refuse_too_much(seats, [{"CPU": 4, "GPU": 2}])
    with pytest.raises(
        ConfigError, match=r"1 learner, 2 sampler, 1 teacher main need 4 CPUs and 2 GPUs, and"
    ):
        refuse_too_much(seats, [{"CPU": 2.0}, {"CPU": 1.0}])
    with pytest.raises(ConfigError, match="one teacher main needs 1 CPUs and 2 GPUs on one machine"):
        refuse_too_much(seats, [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}])


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
    seats = Ray(learner_ranks=2).seats
    learner = load_recipe("full").learner
    with (
        pytest.raises(ConfigError, match="torchrun has started ranks already"),
        started(learner, seats, print),
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
    group.rank, group.size, group.busy, group.failed, group._pulse = 0, 2, failed, False, None  # type: ignore[assignment]
    if failed:
        group.leave()
    group._watch(1)
    assert seen == ends
