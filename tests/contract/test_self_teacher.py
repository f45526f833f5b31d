"""The student as its own teacher: how phi follows theta, what is kept of it, and that it answers as its model
does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import tiny
from device import here
from laws.test_resume import stop_after, told
from reflux import checks
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.contexts.wording import with_attempts
from reflux.errors import ConfigError, ModelError
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.runtime.weights import InMemory
from reflux.storage import checkpoints
from reflux.teachers import in_process_teacher
from reflux.teachers.base import TeacherRequest
from reflux.teachers.self_teacher import SelfTeacher
from reflux.teachers.self_teacher_engine import SelfTeacherEngine, move
from reflux.types import Attempt, HiddenTarget
from tiny import ask, plainly, rollout, same

NOW = StepContext(0, 0)
CHAT = {"kind": "outside:Chat"}
SHOWN = {"kind": "peers", "successes": 1, "failures": 1}


def own(net: Any = None, *, requirements: Requirements = Requirements(), **fields: Any) -> SelfTeacherEngine:
    model = as_model(net or tiny.net(1), character_tokenizer())
    return SelfTeacherEngine(
        SelfTeacher(**fields), tiny.context(requirements), tiny.services(), model, model.renderer(None, None)
    )


def student(seed: int) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tiny.net(seed).state_dict().items()}


def phi(teacher: SelfTeacherEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in teacher.model.net.state_dict().items()}


def publish(
    teacher: SelfTeacherEngine, weights: dict[str, torch.Tensor], version: int, step: int | None = None
) -> None:
    asyncio.run(teacher.publish(InMemory.of(weights, version), version if step is None else step))


# --- how it follows


@pytest.mark.parametrize("follow", ["ema", "live", "frozen"])
def test_the_first_word_is_copied(follow: Any) -> None:
    teacher = own(follow=follow)
    publish(teacher, student(7), 0)
    assert same(phi(teacher), student(7))


def test_an_average_is_the_definition() -> None:
    """phi_n = (1 - e)^n theta_0 + e sum (1 - e)^(n - k) theta_k, in float64 from the formula; shared matrices
    move once.
    """
    teacher = own(ema=0.3)
    path = [student(seed) for seed in range(4)]
    for version, weights in enumerate(path):
        publish(teacher, weights, version)
    for name, value in phi(teacher).items():
        expected = path[0][name].double()
        for weights in path[1:]:
            expected = 0.7 * expected + 0.3 * weights[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    # the matrix that could move twice
    assert teacher.model.net.lm_head.weight is teacher.model.net.get_input_embeddings().weight


def test_one_keeps_theta_and_nought_the_start_to_the_bit() -> None:
    """Identity 6, negative zeros included."""
    start, later = student(1), student(2)
    start["model.norm.weight"][:2] = -0.0
    for share, expected in ((1.0, later), (0.0, start)):
        teacher = own(ema=share)
        publish(teacher, start, 0)
        publish(teacher, later, 1)
        assert same(phi(teacher), expected)
        assert same_bits(phi(teacher), expected)


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one)


@given(share=st.floats(0, 1), values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_move_is_exact_where_the_two_are_equal(share: float, values: list[float]) -> None:
    theta = torch.tensor(values)
    moved = theta.clone()
    move(moved, theta, share)
    assert torch.equal(moved, theta)


def test_a_copy_does_not_depend_on_what_was_there() -> None:
    broken, theta = torch.tensor([torch.nan, torch.inf, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    move(broken, theta, 1.0)
    assert torch.equal(broken, theta)


def test_small_moves_are_not_lost() -> None:
    """In bfloat16 a share of 0.001 of a small difference would round away for ever; phi is float32 whatever
    the student publishes.
    """
    teacher = own(ema=0.001)
    start = student(1)
    publish(teacher, start, 0)
    later = {name: (value * 1.001).bfloat16() for name, value in start.items()}
    for version in range(1, 200):
        publish(teacher, later, version)
    name = "model.layers.0.mlp.up_proj.weight"
    assert phi(teacher)[name].dtype == torch.float32
    expected = start[name].double() + (1 - 0.999**199) * (later[name].double() - start[name].double())
    torch.testing.assert_close(phi(teacher)[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_same_version_twice_moves_nothing() -> None:
    teacher = own(ema=0.5)
    publish(teacher, student(1), 0)
    publish(teacher, student(2), 1)
    before = phi(teacher)
    publish(teacher, student(2), 1)
    publish(teacher, student(3), 1)
    assert same(phi(teacher), before)


def test_live_is_theta_and_has_no_state(tmp_path: Path) -> None:
    teacher = own(follow="live")
    for version, seed in enumerate((1, 2, 3)):
        publish(teacher, student(seed), version)
        assert same(phi(teacher), student(seed))
    teacher.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    other = own(follow="live")
    other.load(tmp_path)
    publish(other, student(3), 2)
    assert same(phi(other), phi(teacher))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_frozen_copy_stays_as_it_was_after_its_step(step: int) -> None:
    """Until then it is the student. As the loop does it: published before the first step, and after each."""
    teacher = own(follow="frozen", step=step)
    publish(teacher, student(10), 0)
    for done in (1, 2, 3):
        publish(teacher, student(10 + done), done)
        assert same(phi(teacher), student(10 + min(done, step)))


@pytest.mark.parametrize("saved_at", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_frozen_copy_is_taken_up_again(saved_at: int, step: int, tmp_path: Path) -> None:
    teacher = own(follow="frozen", step=step)
    for done in range(saved_at + 1):
        publish(teacher, student(10 + done), done)
    teacher.save(tmp_path)
    again = own(tiny.net(5), follow="frozen", step=step)
    again.load(tmp_path)
    publish(again, student(10 + saved_at), saved_at)
    publish(again, student(10 + saved_at + 1), saved_at + 1)
    assert same(phi(again), student(10 + min(saved_at + 1, step)))


@pytest.mark.parametrize(
    ("fields", "follows"), [({}, True), ({"follow": "live"}, True), ({"follow": "frozen"}, False)]
)
def test_who_moves_says_so(fields: dict[str, Any], follows: bool) -> None:
    assert SelfTeacher(**fields).follows == follows
    assert SelfTeacher(follow="frozen", step=3).follows
    assert SelfTeacher().ema == 0.05
    assert SelfTeacher().at_ids
    assert SelfTeacher().offers == (HiddenTarget,)


@pytest.mark.parametrize(
    "fields", [{"ema": 1.1}, {"ema": -0.1}, {"step": -1}, {"follow": "x"}, {"step": 2}, {"model": "m"}]
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SelfTeacher(**fields)


def test_state_holds_each_matrix_once_and_restores_to_the_bit(tmp_path: Path) -> None:
    teacher = own(ema=0.3)
    publish(teacher, student(1), 0)
    publish(teacher, student(2), 1)
    teacher.save(tmp_path)
    state = checkpoints.read(tmp_path)
    assert sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor)) == teacher.macs
    again = own(tiny.net(9), ema=0.3)
    again.load(tmp_path)
    for one in (teacher, again):
        publish(one, student(2), 1)
        publish(one, student(3), 2)
    assert same(phi(again), phi(teacher))
    assert again.version == teacher.version == 2


# --- what it says


def objective_teachers(made: Attempt) -> HiddenTarget:
    target = made.target("main")
    assert isinstance(target, HiddenTarget)
    return target


@pytest.mark.parametrize("batch_tokens", [1, 400, 10_000])
def test_it_reads_the_response_at_its_own_offset(batch_tokens: int) -> None:
    """A longer prompt than the student's: the log-probs are those of the rendered text by hand, whatever else
    is in the batch.
    """
    net = tiny.net(3, layers=2)
    teacher = own(net, requirements=Requirements(logp=True), batch_tokens=batch_tokens)
    tokenizer, asked = character_tokenizer(), []
    for n in (1, 7, 4, 9):
        made = Attempt(rollout(n, seed=n))
        problem = made.rollout.prompt.messages[0]["content"]
        content = with_attempts(problem, ["2+2=4"] * (n % 3), ["2+2=5"])
        asked.append(
            (
                made,
                TeacherPrompt(({"role": "system", "content": "x" * n}, {"role": "user", "content": content})),
            )
        )
    asyncio.run(ask(teacher, *asked))
    for made, view in asked:
        spoken, target = made.rollout, objective_teachers(made)
        text = tokenizer.apply_chat_template(list(view.messages), tokenize=False, add_generation_prompt=True)
        assert text.endswith("Now solve the original question correctly.<assistant>")
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = here([[*prompt, *spoken.tokens_T.tolist()]])
        with torch.no_grad():
            logp_TV = net(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
        assert target.logp_T is not None
        np.testing.assert_allclose(target.logp_T, logp_TV[range(spoken.length), spoken.tokens_T], atol=1e-4)
        torch.testing.assert_close(
            tiny.HEADS[target.head].logits(target.h_TH).log_softmax(-1).cpu(), logp_TV, rtol=1e-4, atol=1e-4
        )


def test_padding_of_the_teachers_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity 5: other ids in the padding, the same states to the bit."""

    states = []
    for pad in (0, 77):

        def filled(shape: Any, dtype: Any = None, pad: int = pad) -> np.ndarray:
            return np.full(shape, pad, dtype=dtype)

        monkeypatch.setattr(
            in_process_teacher,
            "np",
            SimpleNamespace(zeros=filled, int64=np.int64, concatenate=np.concatenate),
        )
        attempts = [Attempt(rollout(n, seed=n)) for n in (2, 9, 5)]
        asyncio.run(ask(own(), *plainly(attempts)))
        states.append({str(i): objective_teachers(a).h_TH for i, a in enumerate(attempts)})
    assert same(*states)


def poisoned(where: str) -> Any:
    net = tiny.net(1)
    if where == "a layer":
        net.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    elif where == "one row of the head":
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
        net.lm_head.weight.data[50, 3] = torch.nan
    else:
        net.get_input_embeddings().weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
        net.get_input_embeddings().weight.data[33] = torch.inf
    return net


@pytest.mark.parametrize("where", ["a layer", "one row of the head", "one token's embedding"])
def test_what_is_no_number_is_an_error_with_the_attempts_id(where: str) -> None:
    attempts = [Attempt(rollout(4, seed=n, sample=n)) for n in (1, 2)]
    for attempt in attempts:
        # the second alone meets the token, in the middle of its answer
        tokens_T = np.array([20, 33 if attempt is attempts[1] else 21, 22, 23])
        attempt.rollout = replace(attempt.rollout, tokens_T=tokens_T, prompt_tokens=np.array([20, 21]))
    first = 2 if where == "one token's embedding" else 1
    with pytest.raises(
        ModelError, match=rf"teachers\.main: its logits for prompt p{first}, sample \d are not numbers"
    ):
        asyncio.run(ask(own(poisoned(where)), *plainly(attempts)))


def test_a_state_that_is_no_number_after_the_first_is_found_too() -> None:
    """Attention that skips the future leaves the states before it whole."""
    attempts = [Attempt(rollout(3, seed=n)) for n in (1, 2)]
    states = [torch.zeros(3, 32), torch.zeros(3, 32)]
    states[1][2, 5] = torch.inf
    with pytest.raises(ModelError, match="prompt p2, sample 0 are not numbers"):
        own()._refuse_nan(
            [TeacherRequest(a.rollout, TeacherPrompt(()), Requirements()) for a in attempts], states
        )


def test_a_context_too_long_is_refused_in_words() -> None:
    made = Attempt(rollout(100, seed=1))
    with pytest.raises(
        ModelError,
        match=r"take \d+ tokens, but the model's context window holds 512.*shorten the teacher's context",
    ):
        asyncio.run(ask(own(), (made, TeacherPrompt(({"role": "user", "content": "x" * 450},)))))


@pytest.mark.parametrize(
    "objective",
    [Divergence(divergence="jsd", support="student", k=100), Divergence(divergence="jsd"), Divergence()],
)
def test_an_empty_wrapper_costs_nothing(objective: Any) -> None:
    """Identity 3: same messages, phi = theta: cost 0 and gradient 0 at every position; in another context
    neither.
    """
    learner = tiny.learner(tiny.net(4))
    teacher = own(tiny.net(1))
    publish(teacher, dict(learner.weights), 0)
    found = {}
    for name in ("same", "told"):
        attempts = [Attempt(rollout(n, seed=n)) for n in (1, 8, 5)]
        views = [
            TeacherPrompt(
                a.rollout.prompt.messages
                if name == "same"
                else ({"role": "user", "content": "the answer is 7"},)
            )
            for a in attempts
        ]
        asyncio.run(ask(teacher, *zip(attempts, views, strict=True)))
        stats = tiny.move(learner, [attempts], [objective])
        largest = max(float(p.grad.abs().max()) for p in learner.trained.values() if p.grad is not None)
        found[name] = (abs(float(stats["loss"].value or 0)), largest)
    assert max(found["same"]) < 2e-6
    assert min(found["told"]) > 1e-3


def test_no_gradient_reaches_the_teacher() -> None:
    """Identity 5: not even where the loss runs through its head."""
    learner, teacher = tiny.learner(tiny.net(4)), own(tiny.net(1))
    made = Attempt(rollout(5, seed=1))
    asyncio.run(ask(teacher, (made, TeacherPrompt(({"role": "user", "content": "told"},)))))
    before = phi(teacher)
    tiny.move(learner, [[made]], [Divergence(divergence="jsd", support="student", k=3)])
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.net.parameters())
    assert same(before, phi(teacher))


# --- in a run


def run_settings(**more: Any) -> dict[str, Any]:
    return {
        "steps": 4,
        "save_every": 1,
        "keep_checkpoints": 9,
        "task": CHAT,
        "group_size": 3,
        "rewards": {"verifier": {}},
        **more,
    }


def table(**fields: Any) -> dict[str, Any]:
    return {"main": {"kind": "self", "context": SHOWN, **fields}}


def states(folder: Path, part: str) -> list[dict[str, Any]]:
    kept = folder / "checkpoints"
    return [checkpoints.read(checkpoints.of_step(kept, step) / part) for step in checkpoints.steps(kept)]


def phis(folder: Path) -> list[dict[str, Any]]:
    found = states(folder, "teachers/main")
    return [
        {name.removeprefix("phi/"): value for name, value in state.items() if name.startswith("phi/")}
        for state in found
    ]


def thetas(folder: Path, names: Any) -> list[dict[str, Any]]:
    return [{name: state[f"weight/{name}"] for name in names} for state in states(folder, "learner")]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_phi_of_a_run_is_the_average_of_its_checkpoints(
    tiny_run: Callable[..., Any], student: str, lora: Any
) -> None:
    done = tiny_run(
        "full",
        **run_settings(
            teachers=table(ema=0.3), learner__lr=1e-2, **({"learner__lora": lora} if lora else {})
        ),
    )
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    average = phis(done.dir)
    assert states(done.dir, "teachers/main")[-1]["version"] == 4
    if lora:
        # the merged student is only in the last export
        assert all(not same(average[i], average[i + 1]) for i in range(3))
        assert not any("lora" in name or "base_layer" in name for name in average[0])
        return
    expected = {name: start[name].double() for name in average[0]}
    for theta, found in zip(thetas(done.dir, average[0]), average, strict=True):
        expected = {name: 0.7 * expected[name] + 0.3 * theta[name].double() for name in expected}
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "at"), [({"ema": 1.0}, "theta"), ({"ema": 0.0}, "start"), ({"follow": "frozen"}, "start")]
)
def test_phi_at_its_limits_in_a_run(
    tiny_run: Callable[..., Any], student: str, fields: dict[str, Any], at: str
) -> None:
    done = tiny_run("full", **run_settings(teachers=table(**fields)))
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    for theta, found in zip(thetas(done.dir, phis(done.dir)[0]), phis(done.dir), strict=True):
        assert same(found, theta if at == "theta" else {name: start[name] for name in found})


def test_phi_frozen_at_a_step_of_a_run(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("full", **run_settings(teachers=table(follow="frozen", step=2)))
    found = phis(done.dir)
    theta = thetas(done.dir, found[0])
    assert [same(found[i], theta[i]) for i in range(4)] == [True, True, False, False]
    assert same(found[3], theta[1])


@pytest.mark.parametrize("fields", [{"ema": 0.3}, {"follow": "live"}, {"follow": "frozen", "step": 2}])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopping_changes_nothing(
    tiny_run: Callable[..., Any],
    student: str,
    teacher: str,
    tmp_path: Path,
    fields: dict[str, Any],
    step: int,
) -> None:
    """Identity 6: phi is taken up bit for bit, and so is all that follows from it."""
    settings = run_settings(teachers=table(**fields), save_every=2)
    whole = tiny_run("full", **settings)
    stop_after(step, tmp_path / "stopped", tiny.config("full", student, teacher, **settings))
    resumed = tiny_run("full", **settings, out=tmp_path / "stopped", resume=True)
    assert same(whole.state, resumed.state)
    if fields != {"follow": "live"}:
        # which has nothing to keep
        assert same(states(whole.dir, "teachers/main")[-1], states(resumed.dir, "teachers/main")[-1])
    assert told(whole) == told(resumed)


def test_a_step_that_was_not_made_leaves_phi_alone(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient norm below the noise floor, and one that is not finite."""
    from reflux.errors import StepRefused

    done = tiny_run("full", **run_settings(teachers=table(ema=0.5), learner__min_grad_norm=1e9))
    assert same(*phis(done.dir)[:2])
    assert states(done.dir, "teachers/main")[-1]["version"] == 0
    published = []
    publish = SelfTeacherEngine._publish
    monkeypatch.setattr(
        SelfTeacherEngine,
        "_publish",
        lambda self, weights, version: (published.append(version), publish(self, weights, version)),
    )
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(StepRefused):
        tiny_run("full", **run_settings(teachers=table(ema=0.5)))
    assert published == [0]


def test_phi_learns_of_a_jump_after_a_step_that_was_not_made(
    tiny_run: Callable[..., Any], student: str
) -> None:
    """The weights moved, so they have another version; the step by itself moved nothing."""
    jump = {"kind": "outside:Jump", "at": 2, "by": 0.5, "score": "minus_kl"}
    done = tiny_run(
        "full", **run_settings(teachers=table(ema=0.5), learner__min_grad_norm=1e9, extrapolation=jump)
    )
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    before, *after = phis(done.dir)
    assert same(before, {name: start[name] for name in before})
    for found in after:
        # half of the way to theta, which has 1.5 times its start
        for name, value in found.items():
            torch.testing.assert_close(value, 1.25 * start[name], rtol=1e-5, atol=1e-7)
    assert [state["version"] for state in states(done.dir, "teachers/main")] == [0, 1, 1, 1]
    assert [row["staleness_max"] for row in done.rows("metrics")] == [0, 0, 0, 0]


def test_several_teachers_at_once_by_name(tiny_run: Callable[..., Any], teacher: str) -> None:
    """A local teacher as it is, and the student itself in a context: each heard by its own objective, the
    loss their sum.
    """
    both = {
        "main": {"kind": "local", "model": teacher},
        "self": {"kind": "self", "context": {"kind": "privileged"}},
    }
    objectives = [
        {"kind": "divergence"},
        {"kind": "divergence", "teacher": "self", "divergence": "jsd", "coef": 0.5},
    ]

    def losses(objective_teachers: list[Any]) -> float:
        done = tiny_run("full", **run_settings(steps=1, teachers=both, objectives=objective_teachers))
        row = next(row for row in done.rows("attempts") if row["kind"] == "learned")
        assert set(row["teacher_logp"]) >= {
            objective.get("teacher", "main") for objective in objective_teachers
        }
        assert done.rows("metrics")[0]["without_target"] == {"main": 0, "self": 0}
        return done.rows("metrics")[0]["loss"]

    one, other, together = losses(objectives[:1]), losses(objectives[1:]), losses(objectives)
    assert one > 0
    assert other > 0
    assert together == pytest.approx(one + other, rel=1e-5)


def test_a_teacher_that_moves_needs_lag_nought(student: str, teacher: str) -> None:
    for fields, fine in (
        ({"follow": "frozen"}, True),
        ({}, False),
        ({"follow": "live"}, False),
        ({"follow": "frozen", "step": 1}, False),
    ):
        cfg = tiny.config("full", student, teacher, **run_settings(teachers=table(**fields), max_staleness=1))
        if fine:
            checks.join(cfg)
        else:
            with pytest.raises(ConfigError, match="follows the student"):
                checks.join(cfg)


def test_a_frozen_copy_teaches_at_a_lag(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("full", **run_settings(teachers=table(follow="frozen"), max_staleness=2))
    assert [row["step"] for row in done.rows("metrics")] == [1, 2, 3, 4]


def test_it_renders_as_the_sampler_does(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    read = SelfTeacherEngine._read

    def spy(self: Any, requests: Any, inputs: Any) -> Any:
        seen.extend(character_tokenizer().decode(found.ids_L[: found.first]) for found in inputs)
        return read(self, requests, inputs)

    monkeypatch.setattr(SelfTeacherEngine, "_read", spy)
    tiny_run(
        "full",
        **run_settings(steps=1, teachers=table(context={"kind": "privileged"}), learner__system="be brief"),
    )
    assert seen
    assert all(
        text.startswith("<system>be brief<user>") and text.endswith("correctly.<assistant>") for text in seen
    )


def test_the_whole_program_knows_a_teacher_without_a_model(
    tiny_run: Callable[..., Any], student: str, teacher: str
) -> None:
    """plan, doctor, report, evaluations, model card, citations."""
    from reflux.config.citations import papers
    from reflux.inspection.doctor import examine
    from reflux.inspection.plan import plan
    from reflux.reports.page import write_report

    changes = {
        "evals__teacher_accuracy": {"problems": 2},
        "evals__agreement": {"prompts": 2},
        "evals__accuracy": {"problems": 2},
    }
    done = tiny_run("peers", **run_settings(steps=2, **changes))
    first = done.rows("evals")[0]
    assert first["teacher_accuracy"]["accuracy"] is None
    # a group of one has no peers
    assert first["agreement"]["kl_nats"] is None
    assert "taught by: itself" in (done.dir / "student" / "README.md").read_text()
    write_report(done.dir)
    assert "the student itself" in (done.dir / "report.html").read_text()

    cfg = tiny.config("peers", student, teacher, task=CHAT)
    found = plan(cfg)
    assert found.teachers["main"].parameters == found.student.parameters == tiny.net(1).num_parameters()
    # master, gradient, two moments; the sampler's copy; phi
    assert found.memory_bytes == tiny.net(1).num_parameters() * 24
    keys = {paper.key for paper in papers(cfg)}
    assert {"peers", "mean_teacher"} <= keys
    assert not {"sdpo", "opsd", "sdft"} & keys
    told_answers = {"kind": "privileged", "show": "demonstration"}
    for context, cited in (({"successes": 1, "failures": 0}, {"sdpo"}), (told_answers, {"opsd", "sdft"})):
        other = tiny.config("peers", student, teacher, teachers__main__context={"kind": "peers", **context})
        assert cited <= {paper.key for paper in papers(other)}

    async def findings() -> list[Any]:
        return [finding async for finding in examine(cfg, prompts=2)]

    made = asyncio.run(findings())
    assert not [finding for finding in made if finding.verdict == "failed" and finding.check != "disk"]
    assert any(finding.check == "teacher" for finding in made)
