"""The flow teacher: its velocity along the student's states, who shares a base with whom, and who is refused
before anything is drawn.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_flow
from device import DEVICE
from reflux.config.context import Generation, PartContext, StudentSpec
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.errors import ModelError
from reflux.learners.flow import Flow as LearnerPart
from reflux.learners.flow_engine import FlowLearner
from reflux.models.flow.adapter_files import PEFT
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.load import load_flow
from reflux.models.settings import FlowLora
from reflux.runtime.services import Services
from reflux.runtime.weights import InMemory
from reflux.samplers.flow import Flow as Sampler
from reflux.teachers.collection import Teachers
from reflux.teachers.flow import Flow
from reflux.teachers.flow_engine import FlowTeacher
from reflux.types import Attempt, FlowRollout, VelocityTarget
from tiny import ask, plainly
from tiny_flow import save, save_adapter, velocities

NOW = StepContext(0, 0)


def a_run(student: str, generation: Generation = Sampler().generation) -> tuple[PartContext, Services]:
    return tiny.context(model=student, generation=generation), tiny.services(StudentSpec(student))


def opened(run: tuple[PartContext, Services], **tables: Flow) -> dict[str, FlowTeacher]:
    """All of them, as a run opens them: one after the other."""

    async def one(table: str, cfg: Flow) -> FlowTeacher:
        async with cfg.open(replace(run[0], name=table), run[1]) as teacher:
            return teacher

    return {table: asyncio.run(one(table, cfg)) for table, cfg in tables.items()}


def score(teacher: FlowTeacher, attempts: list[Attempt]) -> list[np.ndarray]:
    """What it says, by attempt."""
    asyncio.run(ask(teacher, *plainly(attempts)))
    return [behaviour(a, teacher.name) for a in attempts]


def behaviour(attempt: Attempt, name: str) -> np.ndarray:
    target = attempt.target(name)
    assert isinstance(target, VelocityTarget)
    return target.v_TD


def some(count: int = 5, **fields: Any) -> list[Attempt]:
    """Attempts of other prompts, lengths, grids and states."""
    texts = tiny_flow.TEXTS[1:]
    return [
        tiny_flow.attempt(2 + i % 3, seed=i, text=texts[i % len(texts)], whole=i != 1, **fields)
        for i in range(count)
    ]


def checksum(model: FlowModel) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.net.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.fixture
def student(tmp_path: Path) -> str:
    return save(tmp_path / "student", 1)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save(tmp_path / "teacher", 2)


# --- what it says


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_it_says_what_its_model_says_at_every_counted_state(
    student: str, folder: str, guidance: float, batch: int
) -> None:
    """Whatever the size of a call, up to rounding; NaN at the steps that do not count."""
    teacher = opened(a_run(student), main=Flow(folder, batch_positions=batch))["main"]
    attempts = some(guidance=guidance)
    for made, v_TD in zip(attempts, score(teacher, attempts), strict=True):
        expected = velocities(tiny_flow.model(2), made.rollout).v_TD
        assert v_TD.dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(v_TD).all(1), made.rollout.mask_T)
        np.testing.assert_array_equal(np.isnan(v_TD).all(1), ~made.rollout.mask_T)
        np.testing.assert_allclose(v_TD, expected, rtol=1e-5, atol=1e-5)
        assert made.answers["main"].positions_read == int(made.rollout.mask_T.sum())


def test_masked_steps_are_never_asked_about(student: str, folder: str) -> None:
    """A state there that is no number changes no bit of what is said elsewhere."""
    teacher = opened(a_run(student), main=Flow(folder))["main"]
    plain, odd = some(2), some(2)
    for made in odd:
        mask_T = made.rollout.mask_T.copy()
        mask_T[0] = False
        x_SD = np.where(np.append(mask_T, False)[:, None], made.rollout.x_SD, np.float32(np.nan))  # type: ignore[attr-defined]
        made.rollout = replace(made.rollout, mask_T=mask_T, x_SD=x_SD)  # type: ignore[call-arg]
    for a, b, made in zip(score(teacher, plain), score(teacher, odd), odd, strict=True):
        np.testing.assert_allclose(b[made.rollout.mask_T], a[made.rollout.mask_T], rtol=1e-5, atol=1e-5)
        assert np.isnan(b[~made.rollout.mask_T]).all()
    none = tiny_flow.attempt(3, mask_T=np.zeros(3, dtype=bool))
    assert np.isnan(score(teacher, [none, *some(1)])[0]).all()


def test_states_times_and_targets_do_not_change_what_is_stored(student: str, folder: str) -> None:
    teacher = opened(a_run(student), main=Flow(folder))["main"]
    attempts = some()
    before = [
        (r.x_SD.copy(), r.t_S.copy(), r.mask_T.copy())
        for r in (a.rollout for a in attempts)
        if isinstance(r, FlowRollout)
    ]
    score(teacher, attempts)
    after = [(r.x_SD, r.t_S, r.mask_T) for r in (a.rollout for a in attempts) if isinstance(r, FlowRollout)]
    assert all(
        np.array_equal(x, y)
        for one, other in zip(before, after, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def test_the_student_as_teacher_says_what_the_student_said(student: str) -> None:
    """Identity 3: at identity there is nothing to learn. `behaviour` was computed state by state while
    drawing.
    """
    attempts = some(drawn_by=tiny_flow.model(1), guidance=2.0)
    teacher = opened(a_run(student), main=Flow(student))["main"]
    for made, v_TD in zip(attempts, score(teacher, attempts), strict=True):
        assert isinstance(made.rollout.behaviour, VelocityTarget)
        np.testing.assert_allclose(v_TD, made.rollout.behaviour.v_TD, rtol=1e-5, atol=1e-5)


def test_the_teacher_says_what_a_learner_of_its_weights_would(student: str, tmp_path: Path) -> None:
    """Whole, and with an adapter that the one has on and the other goes on training."""
    one, _ = adapters(tmp_path)
    for adapter, lora in ((None, None), (one, FlowLora(rank=2, alpha=4.0, targets=tiny_flow.ENDS))):
        run = a_run(student)
        part = LearnerPart(student, adapter=adapter, lora=lora, micro_batch=3, autocast="off")
        learner = FlowLearner(part, *run, load_flow(student, "here"))
        teacher = opened(run, main=Flow(student, adapter=adapter))["main"]
        attempts = some(guidance=2.0)
        found = score(teacher, attempts)
        for (attempt, v_TD), said_TD in zip(learner.velocities([attempts]), found, strict=True):
            assert attempt in attempts
            np.testing.assert_allclose(said_TD, v_TD, rtol=1e-5, atol=1e-5)


def test_attempts_of_other_guidance_or_size_are_never_mixed(student: str, folder: str) -> None:
    teacher = opened(a_run(student), main=Flow(folder))["main"]
    mixed = [
        tiny_flow.attempt(3, seed=0),
        tiny_flow.attempt(3, seed=1, guidance=2.0),
        tiny_flow.attempt(3, seed=2, shape=(1, 8, 8)),
    ]
    apart = [
        tiny_flow.attempt(3, seed=0),
        tiny_flow.attempt(3, seed=1, guidance=2.0),
        tiny_flow.attempt(3, seed=2, shape=(1, 8, 8)),
    ]
    assert same(score(teacher, mixed), [score(teacher, [made])[0] for made in apart])


def test_another_view_is_another_prompt(student: str, folder: str) -> None:
    teacher = opened(a_run(student), main=Flow(folder))["main"]
    made, other = tiny_flow.attempt(3, text="draw 1"), tiny_flow.attempt(3, text="draw 2")
    asyncio.run(ask(teacher, (made, TeacherPrompt(other.rollout.prompt.messages))))
    assert same([behaviour(made, "main")], score(teacher, [other]))
    with pytest.raises(ModelError, match="replaces text inside a response"):
        asyncio.run(ask(teacher, (made, TeacherPrompt((), {0: "x"}))))


# --- routes


def test_a_route_does_not_feel_another_teacher(student: str, tmp_path: Path) -> None:
    """Another teacher for route b moves no bit of what route a is told."""
    texts = {"a": "draw 1", "b": "draw 2"}

    def told(of_b: str) -> dict[str, list[np.ndarray]]:
        run = a_run(student)
        tables = {
            "one": Flow(save(tmp_path / "one", 2), alias="main", routes=("a",)),
            "two": Flow(of_b, alias="main", routes=("b",)),
        }
        teachers = Teachers(
            {name: (tables[name], teacher) for name, teacher in opened(run, **tables).items()},
            Requirements(),
            tiny.services(),
        )
        groups = [
            [tiny_flow.attempt(3, seed=i, text=texts[route], route=route)] for i, route in enumerate("abab")
        ]
        asyncio.run(teachers.score(groups, NOW))
        assert [group[0].answers["main"].table for group in groups] == ["one", "two", "one", "two"]
        return {
            route: [behaviour(g[0], "main") for g in groups if g[0].rollout.prompt.route == route]
            for route in "ab"
        }

    first, second = told(save(tmp_path / "two", 3)), told(save(tmp_path / "three", 4))
    assert same(first["a"], second["a"])
    assert not same(first["b"], second["b"])


def test_two_routed_copies_of_one_teacher_are_the_single_one(student: str, folder: str) -> None:
    """Bit for bit where the calls are cut alike (here by attempt), else up to rounding; the order of routes
    changes nothing.
    """
    for batch, exact in ((2, True), (64, False)):
        single = opened(a_run(student), main=Flow(folder, batch_positions=batch))["main"]
        expected = score(single, [tiny_flow.attempt(3, seed=i) for i in range(6)])
        for routes in ("ababab", "bbabaa"):
            tables = {
                name: Flow(folder, alias="main", routes=(name,), batch_positions=batch) for name in "ab"
            }
            made = opened(a_run(student), **tables)
            # loaded once
            assert made["a"].model.net is made["b"].model.net
            teachers = Teachers(
                {name: (tables[name], made[name]) for name in made}, Requirements(), tiny.services()
            )
            groups = [[tiny_flow.attempt(3, seed=i, route=route)] for i, route in enumerate(routes)]
            asyncio.run(teachers.score(groups, NOW))
            found = [behaviour(group[0], "main") for group in groups]
            if exact:
                assert same(found, expected)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- one base


def adapters(tmp_path: Path) -> tuple[str, str]:
    base = tiny_flow.model(1)
    return save_adapter(tmp_path / "a1", base, 3), save_adapter(
        tmp_path / "a2", base, 4, format="diffusers", rank=3
    )


def test_tables_share_a_base_and_each_speaks_as_it_does_alone(student: str, tmp_path: Path) -> None:
    """One, two, one again, the anchor: the same bits in any order, and those of tables that share nothing."""
    one, two = adapters(tmp_path)
    tables = {"one": Flow(student, adapter=one), "two": Flow(student, adapter=two), "anchor": Flow(student)}
    alone = {name: score(opened(a_run(student), **{name: cfg})[name], some()) for name, cfg in tables.items()}
    assert not same(alone["one"], alone["two"])
    assert not same(alone["one"], alone["anchor"])
    made = opened(a_run(student), **tables)
    assert len({id(teacher.model.net) for teacher in made.values()}) == 1
    for name in ("one", "two", "one", "anchor", "two", "anchor", "one"):
        assert same(score(made[name], some()), alone[name]), name
    for anchor in some():
        # the anchor is the base that was saved
        expected = velocities(tiny_flow.model(1), anchor.rollout).v_TD
        np.testing.assert_allclose(score(made["anchor"], [anchor])[0], expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_the_model_with_its_product_added(student: str, tmp_path: Path) -> None:
    one, _ = adapters(tmp_path)
    by_hand = tiny_flow.model(1)
    with torch.no_grad():
        for name, (A, B) in tiny_flow.factors(by_hand, 3).items():
            by_hand.net.transformer.get_submodule(name).weight += 4.0 / 2 * B @ A
    made = opened(a_run(student), main=Flow(student, adapter=one))["main"]
    attempts = some()
    for attempt, v_TD in zip(attempts, score(made, attempts), strict=True):
        np.testing.assert_allclose(v_TD, velocities(by_hand, attempt.rollout).v_TD, rtol=1e-4, atol=1e-4)


def test_two_tables_with_one_adapter_hold_it_once(student: str, tmp_path: Path) -> None:
    one, _ = adapters(tmp_path)
    made = opened(a_run(student), a=Flow(student, adapter=one), b=Flow(student, adapter=one))
    assert len([n for n, _ in made["a"].model.net.named_parameters() if ".lora_A." in n]) == len(
        tiny_flow.modules(tiny_flow.model(1))
    )
    assert same(score(made["a"], some()), score(made["b"], some()))


def test_other_types_or_models_share_nothing(student: str, folder: str) -> None:
    made = opened(
        a_run(student),
        a=Flow(student),
        b=Flow(student, dtype="bfloat16"),
        c=Flow(folder),
        d=Flow(student, device="cpu"),
    )
    nets = {name: id(teacher.model.net) for name, teacher in made.items()}
    assert len(set(nets.values())) == (3 if DEVICE == "cpu" else 4)
    assert made["b"].model.net.dtype == torch.bfloat16
    rough = score(made["b"], some())
    for fine, coarse in zip(score(made["a"], some()), rough, strict=True):
        np.testing.assert_allclose(coarse, fine, atol=0.2)
        assert coarse.dtype == np.float32


def test_threads_that_ask_at_once_get_what_they_would_get_in_turn(student: str, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    one, two = adapters(tmp_path)
    made = opened(
        a_run(student),
        one=Flow(student, adapter=one, batch_positions=1),
        two=Flow(student, adapter=two, batch_positions=1),
    )
    expected = {name: score(teacher, some()) for name, teacher in made.items()}
    with ThreadPoolExecutor(2) as pool:
        asked = [(name, pool.submit(score, made[name], some())) for name in ("one", "two") * 5]
    assert all(same(answer.result(), expected[name]) for name, answer in asked)


# --- frozen


def test_a_teacher_stays_as_it_is(student: str, tmp_path: Path) -> None:
    """The same checksum before and after, whoever spoke and whatever was published; nothing to save."""
    one, two = adapters(tmp_path)
    made = opened(
        a_run(student), one=Flow(student, adapter=one), two=Flow(student, adapter=two), anchor=Flow(student)
    )
    before = checksum(made["one"].model)
    base = load_flow(student, "here").net.state_dict()
    for teacher in (*made.values(), made["one"]):
        score(teacher, some())
        asyncio.run(teacher.publish(InMemory.of(tiny_flow.model(7).net.state_dict(), 3), 3))
        teacher.save(tmp_path / "kept")
        teacher.load(tmp_path / "kept")
        assert not (tmp_path / "kept").exists()
    assert checksum(made["one"].model) == before
    after = {
        name.replace(".base_layer", ""): value
        for name, value in made["one"].model.net.state_dict().items()
        if ".lora_" not in name
    }
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert not any(value.requires_grad for value in made["one"].model.net.parameters())
    assert not any(cfg.follows for cfg in (Flow(student), Flow(student, adapter=one)))


def test_macs_are_those_of_base_and_own_adapter(student: str, tmp_path: Path) -> None:
    one, two = adapters(tmp_path)
    made = opened(
        a_run(student), one=Flow(student, adapter=one), two=Flow(student, adapter=two), anchor=Flow(student)
    )
    size = sum(value.numel() for value in tiny_flow.model(1).net.transformer.parameters())
    own = {
        name: sum(
            A.numel() + B.numel() for A, B in tiny_flow.factors(tiny_flow.model(1), 3, rank=rank).values()
        )
        for name, rank in (("one", 2), ("two", 3))
    }
    # 4 patches, 2 prompt tokens
    assert made["anchor"].macs == size * (4 + 2)
    again = opened(a_run(student), one=Flow(student, adapter=one))["one"]
    assert again.macs == (size + own["one"]) * 6
    assert made["two"].macs == (size + own["two"]) * 6
    guided = opened(a_run(student, Sampler(guidance=2.0, pixels=8).generation), anchor=Flow(student))[
        "anchor"
    ]
    assert guided.macs == 2 * size * (16 + 2)


# --- who is refused


def refused(student: str, cfg: Flow, sampler: Any = Sampler()) -> str:
    with pytest.raises(ModelError) as error:
        opened(a_run(student, sampler.generation), tutor=cfg)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"shift": 3.0},
            r"has another grid of times than the student (shift 3.0 instead of 1.0; 10 steps begin with 1",
        ),
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500, and the student with 1000"),
        (
            {"side": 8},
            "has states of 1 x 8 x 8 (channels, height, width), and the student has states of 1 x 4 x 4",
        ),
        ({"channels": 4}, "has states of 4 x 4 x 4"),
        ({"texts": tiny_flow.TEXTS[:-2]}, "does not know 2 of the student's prompts, such as 'draw 3'"),
    ],
)
def test_a_teacher_of_other_times_states_or_prompts_is_refused(
    student: str, tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    """Before any weight is read: the file of weights is gone here."""
    odd = Path(save(tmp_path / "odd", 2, **fields))
    (odd / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(student, Flow(str(odd)))
    assert message.startswith("teachers.tutor.model: ")
    assert why in message


def test_what_only_looks_different_is_welcome(student: str, tmp_path: Path) -> None:
    """More prompts, in another order; more layers; another size of image where the run says which size it
    draws.
    """
    texts = ("", "something else", *reversed(tiny_flow.TEXTS[1:]))
    opened(a_run(student), tutor=Flow(save(tmp_path / "deeper", 2, layers=3, texts=texts)))
    opened(a_run(student, Sampler(pixels=8).generation), tutor=Flow(save(tmp_path / "larger", 2, side=8)))
    # a sampler of a user's own
    opened(a_run(student, Generation()), tutor=Flow(save(tmp_path / "other", 2)))


def test_another_scheduler_is_refused(student: str, folder: str) -> None:
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    assert "made for the scheduler DDIMScheduler; only flow matching" in refused(student, Flow(folder))


def test_an_adapter_that_changes_nothing_is_refused(student: str, tmp_path: Path) -> None:
    """All B are 0, as peft begins. One B that is not is enough."""
    base = tiny_flow.model(1)
    silent = save_adapter(tmp_path / "silent", base, 3, size=0.0)
    assert "the adapter in" in (message := refused(student, Flow(student, adapter=silent)))
    assert "does not change the velocities of the model" in message
    file = Path(silent) / PEFT
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: torch.full_like(tensors[key], 0.01)}, file)
    opened(a_run(student), tutor=Flow(student, adapter=silent))


def test_an_adapter_that_is_not_whole_is_refused(student: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", tiny_flow.model(1), 3)
    file = Path(folder) / PEFT
    save_file({key: value for key, value in load_file(file).items() if "1.attn.to_q.lora_B" not in key}, file)
    message = refused(student, Flow(student, adapter=folder))
    assert message.startswith("teachers.tutor.adapter: ")
    assert "LoRA matrices that are missing (1): transformer_blocks.1.attn.to_q.lora_B" in message


def test_an_adapter_that_was_refused_is_refused_again(student: str, tmp_path: Path) -> None:
    """Another table asks for it in the same run."""
    silent = save_adapter(tmp_path / "silent", tiny_flow.model(1), 3, size=0.0)
    run = a_run(student)
    for _ in range(2):
        with pytest.raises(ModelError, match="does not change the velocities of the model"):
            opened(run, tutor=Flow(student, adapter=silent))


def test_an_adapter_that_changes_nothing_is_noticed_beside_one_that_speaks(
    student: str, tmp_path: Path
) -> None:
    one, _ = adapters(tmp_path)
    silent = save_adapter(tmp_path / "silent", tiny_flow.model(1), 3, size=0.0)
    run = a_run(student)
    speaking = opened(run, one=Flow(student, adapter=one))["one"]
    expected = score(speaking, some())
    with pytest.raises(ModelError, match="does not change the velocities of the model"):
        opened(run, tutor=Flow(student, adapter=silent))
    assert same(score(speaking, some()), expected)


def test_a_guidance_that_is_not_the_attempts_is_refused(student: str) -> None:
    """The config's check says so before sampling; this one speaks where the sampler is a user's own."""
    teacher = opened(a_run(student, Generation()), tutor=Flow(student, guidance=4.5))["tutor"]
    with pytest.raises(
        ModelError,
        match=r"teachers.tutor.guidance is 4.5, but prompt p0 was sampled with guidance 1: .*Leave it out",
    ):
        score(teacher, some(1))
    score(teacher, some(1, guidance=4.5))


def test_a_velocity_that_is_no_number_is_an_error_that_says_where(student: str) -> None:
    teacher = opened(a_run(student), tutor=Flow(student))["tutor"]
    attempts = some(3)
    rollout: Any = attempts[2].rollout
    rollout.x_SD[1, 3] = np.inf
    with pytest.raises(
        ModelError,
        match=r"teachers.tutor: its velocity for prompt p2, sample 0, at denoising step 1 \(from 0, of 4;",
    ):
        score(teacher, attempts)
