"""The context `replay`: where replies are, what a teacher reads in their place, and what a run does with
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fake_vllm import fake_vllm_of, serving
from played import TOKENIZER, played, replies
from reflux import checks
from reflux.config.registry import build
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.contexts.replay import Replay
from reflux.errors import ConfigError, ModelError
from reflux.loop import attempting
from reflux.models.text import Model, load_model
from reflux.rewards.opened_rewards import Rewards
from reflux.rollouts.replies import replies_of
from reflux.runtime.pipeline import Ask
from reflux.tasks.shopping import Shopping
from reflux.teachers.base import TeacherRequest
from reflux.teachers.local import Local
from reflux.teachers.local_engine import LocalTeacher
from reflux.teachers.readings import read_by
from reflux.types import Attempt, Message, TokenRollout

TASK = Shopping(drift_every=1, min_items=3)
K = 4


def attempts(number: int = 3, requirements: Requirements = Requirements()) -> list[TokenRollout]:
    some = islice(TASK.prompts("train", 0), number)
    return [played(TASK, prompt, TASK.worked(prompt, 0), requirements=requirements) for prompt in some]


def replayed(rollout: TokenRollout, step: int) -> list[Message]:
    """The conversation with the prices of another step, from the definition."""
    names = iter((rollout.prompt.answer or "").split("+"))
    prompt = len(rollout.prompt.messages)
    return [
        {**message, "content": str(TASK.price(next(names), step))}
        if message["role"] == "user" and place >= prompt
        else message
        for place, message in enumerate(rollout.messages)
    ]


def view(rollout: TokenRollout, step: int) -> TeacherPrompt:
    (found,) = Replay()([Attempt(rollout)], StepContext(0, 0, completed=step, replay=TASK.replay))
    assert found is not None
    return found


# --- replies of an attempt


def test_replies_are_where_the_student_did_not_choose() -> None:
    for rollout in attempts():
        found = replies_of(rollout)
        assert [reply.messages[0]["content"] for reply in found] == replies(rollout)
        texts = rollout.text.split("\n")
        assert [reply.turn["content"] for reply in found] == texts[:-1]
        for reply in found:
            written = TOKENIZER.decode(rollout.tokens_T[reply.start : reply.end])
            assert written == f"<user>{reply.messages[0]['content']}<assistant>"
            assert not rollout.mask_T[reply.start : reply.end].any()
        covered = sum(reply.end - reply.start for reply in found)
        assert covered == int((~rollout.mask_T).sum())


def test_an_attempt_of_one_turn_has_no_replies_and_an_assistant_that_replies_is_refused() -> None:
    single = tiny.rollout(3)
    message = {"role": "assistant", "content": "abc"}
    assert replies_of(replace(single, messages=(*single.messages, message))) == []
    assert replies_of(tiny.rollout(0)) == []
    with pytest.raises(ValueError, match="1 turns of the student and 2 assistant messages"):
        replies_of(replace(single, messages=(*single.messages, message, message)))


# --- the context


def test_the_context_replaces_the_replies_that_changed() -> None:
    for rollout in attempts(6):
        assert view(rollout, 0) == TeacherPrompt(rollout.prompt.messages, {}, {"replayed": 0.0})
        found, now = view(rollout, 1), replayed(rollout, 1)
        before = [message for message in rollout.messages if message["role"] == "user"][1:]
        after = [message for message in now if message["role"] == "user"][1:]
        places = [reply.start for reply in replies_of(rollout)]
        assert found.messages == rollout.prompt.messages
        assert found.spans == {
            place: (new,) for place, old, new in zip(places, before, after, strict=True) if old != new
        }
        assert found.notes == {"replayed": float(bool(found.spans))}
        assert found.spans


def test_a_task_that_replays_too_few_replies_is_told_so() -> None:
    (rollout,) = attempts(1)
    for short in (lambda *_: [], lambda *_: [()] * 3):
        with pytest.raises(ValueError, match="must give one for each turn"):
            Replay()([Attempt(rollout)], StepContext(0, 0, replay=short))


# --- what a teacher reads


@pytest.fixture(scope="module")
def model(teacher: str) -> Model:
    return load_model(teacher, "model", dtype="float32", device="cpu")


def expected(model: Model, rollout: TokenRollout, messages: list[Message]) -> np.ndarray:
    """[chosen, V]: the log-probs before each of the student's tokens, from the whole text written anew."""
    ids = TOKENIZER.apply_chat_template(messages)["input_ids"]
    chosen, own = [], False
    for place, i in enumerate(ids):
        if own:
            chosen.append(place)
        own = i == TOKENIZER.convert_tokens_to_ids("<assistant>") or (own and i != tiny.END)
    assert [ids[place] for place in chosen] == rollout.tokens_T[rollout.mask_T].tolist()
    with torch.no_grad():
        logits_LV = model.net(input_ids=torch.tensor([ids])).logits[0]
    return logits_LV.log_softmax(-1).numpy()[np.asarray(chosen) - 1]


@torch.no_grad()
def full(model: Model, target: Any) -> np.ndarray:
    """[T, V] of hidden states, nats."""
    return model.head.logits(target.h_TH).log_softmax(-1).numpy()


def requests(step: int, requirements: Requirements) -> list[TeacherRequest]:
    return [
        TeacherRequest(rollout, view(rollout, step), requirements)
        for rollout in attempts(3, Requirements(behaviour=K))
    ]


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("pack", [False, True])
def test_a_local_teacher_reads_the_students_tokens_between_the_new_replies(
    model: Model, step: int, pack: bool
) -> None:
    wanted = Requirements(logp=True, candidates=K)
    teacher = LocalTeacher(Local("m"), tiny.context(wanted), tiny.services(), model)
    if pack:
        teacher.padded_because = ""
    asked = requests(step, wanted)
    for request, answer in zip(asked, teacher.answer(asked), strict=True):
        rollout = request.rollout
        assert isinstance(rollout, TokenRollout)
        logp_NV = expected(model, rollout, replayed(rollout, step))
        target, mask_T = answer.target, rollout.mask_T
        assert target is not None
        assert target.h_TH.shape[0] == rollout.length
        own_TV = full(model, target)
        np.testing.assert_allclose(own_TV[mask_T], logp_NV, atol=1e-4)
        sampled_N = np.take_along_axis(logp_NV, rollout.tokens_T[mask_T][:, None], 1)[:, 0]
        np.testing.assert_allclose(target.logp_T[mask_T], sampled_N, atol=1e-4)
        assert answer.candidates is not None
        np.testing.assert_allclose(answer.candidates.logp_TK[mask_T], logp_NV[:, :K], atol=1e-4)
        assert np.isfinite(target.logp_T).all()
        changed = [str(message["content"]) for message in replayed(rollout, step)]
        read = len(TOKENIZER.apply_chat_template(replayed(rollout, step))["input_ids"])
        assert answer.positions_read == read, changed


@pytest.mark.parametrize("gives", ["student_topk", "sampled", "hidden", "teacher_topk"])
def test_a_teacher_in_a_server_gives_the_same(model: Model, teacher: str, gives: str) -> None:
    asked = requests(1, Requirements(candidates=K))

    async def scored(url: str) -> Any:
        table = {"kind": "vllm", "model": teacher, "url": url, "gives": gives, "device": "cpu", "k": K}
        async with build("teachers", table, "teachers.main").open(tiny.context(), tiny.services()) as opened:
            return await opened.score(asked)

    with serving(fake_vllm_of(model)) as fake:
        answers = asyncio.run(scored(fake.url))
    for request, answer in zip(asked, answers, strict=True):
        rollout = request.rollout
        assert isinstance(rollout, TokenRollout)
        logp_NV, mask_T = expected(model, rollout, replayed(rollout, 1)), rollout.mask_T
        if gives == "hidden":
            own_TV = full(model, answer.target)
            np.testing.assert_allclose(own_TV[mask_T], logp_NV, atol=1e-3)
            continue
        sampled_N = np.take_along_axis(logp_NV, rollout.tokens_T[mask_T][:, None], 1)[:, 0]
        assert len(answer.target.logp_T) == rollout.length
        np.testing.assert_allclose(answer.target.logp_T[mask_T], sampled_N, atol=1e-3)
        if gives == "student_topk":
            np.testing.assert_allclose(answer.target.logp_TK[mask_T], logp_NV[:, :K], atol=1e-3)
        if gives == "teacher_topk":
            listed_NK = np.take_along_axis(logp_NV, answer.target.ids_TK[mask_T], 1)
            np.testing.assert_allclose(answer.target.logp_TK[mask_T], listed_NK, atol=1e-3)


def test_a_reply_to_a_turn_that_a_stop_text_ended_begins_with_the_templates_end(model: Model) -> None:
    """The student's turn has no end token. What replaces its reply writes one, as the reply did."""
    (rollout,) = attempts(1)
    first = replies_of(rollout)[0]
    # as if ")" had ended the first turn: the end token belongs to the reply
    mask_T = rollout.mask_T.copy()
    mask_T[first.start - 1] = False
    cut = replace(rollout, mask_T=mask_T)
    renderer = LocalTeacher(Local("m"), tiny.context(), tiny.services(), model).renderer
    ids = {
        name: read_by("main", TeacherRequest(made, view(made, 1), Requirements()), renderer, 512).ids_L
        for name, made in (("whole", rollout), ("cut", cut))
    }
    assert view(cut, 1).spans != view(rollout, 1).spans
    assert ids["cut"].tolist() == ids["whole"].tolist()


def test_other_messages_before_the_attempt_and_new_replies_in_it_go_together(model: Model) -> None:
    (rollout,) = attempts(1)
    renderer = LocalTeacher(Local("m"), tiny.context(), tiny.services(), model).renderer
    told = ({"role": "system", "content": "be brief"}, *rollout.prompt.messages)
    shown = replace(view(rollout, 1), messages=told)
    reading = read_by("main", TeacherRequest(rollout, shown, Requirements()), renderer, 512)
    whole = [told[0], *replayed(rollout, 1)]
    assert reading.ids_L.tolist() == TOKENIZER.apply_chat_template(whole)["input_ids"][:-1]
    with pytest.raises(ModelError, match="context window holds 60"):
        read_by("main", TeacherRequest(rollout, shown, Requirements()), renderer, 60)


def test_a_later_reply_is_written_after_the_new_ones_before_it(model: Model) -> None:
    """A template may look at all messages before a reply."""
    (rollout,) = attempts(1)
    renderer, seen = LocalTeacher(Local("m"), tiny.context(), tiny.services(), model).renderer, []
    write = renderer.reply_ids

    def listened(before: Any, *more: Any) -> Any:
        seen.append(list(before))
        return write(before, *more)

    renderer.reply_ids = listened  # type: ignore[method-assign]
    read_by("main", TeacherRequest(rollout, view(rollout, 1), Requirements()), renderer, 512)
    now = replayed(rollout, 1)
    assert seen == [now[: 2 * count] for count in range(1, len(view(rollout, 1).spans) + 1)]


# --- checks


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "word_problems"}, "the task 'word_problems' has no tools whose replies can be replayed"),
        ({"kind": "mix", "parts": {"a": {"kind": "word_problems"}}}, "has no tools"),
        ({"kind": "outside:Chat", "replies": 1}, "has no tools"),
        ({"kind": "mix", "parts": {"a": {"kind": "word_problems"}, "b": {"kind": "shopping"}}}, None),
        ({"kind": "ledger"}, None),
    ],
)
def test_a_task_that_cannot_replay_is_refused(
    task: dict[str, Any], words: str | None, student: str, teacher: str
) -> None:
    cfg = tiny.config(
        "full", student, teacher, task=task, teachers__main__context={"kind": "replay"}, max_staleness=1
    )
    if words is None:
        checks.join(cfg)
        return
    with pytest.raises(ConfigError, match=words):
        checks.join(cfg)


def test_without_staleness_it_is_said_to_have_no_effect(student: str, teacher: str) -> None:
    for max_staleness in (0, 2):
        cfg = tiny.config(
            "full",
            student,
            teacher,
            task={"kind": "shopping"},
            teachers__main__context={"kind": "replay"},
            max_staleness=max_staleness,
        )
        told = any("no reply changes before" in text for text in checks.warnings(cfg))
        assert told == (max_staleness == 0)


# --- a run


SCRIPTED = "price(figs)"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's turns are one call, then an answer, whatever its weights are: so the price of figs
    matters to every attempt. Nothing else of the sampler changes.
    """
    from played import ASSISTANT, Writer
    from reflux.samplers.hf_engine import HFSampler

    def generate(self: Any, asks: Any) -> Any:
        texts = {1: SCRIPTED, 2: "Answer: 3"}
        made = [Writer(lambda number, ask=ask: texts[ask.ids.count(ASSISTANT)])._turn(ask) for ask in asks]
        return [replace(turn, version_T=np.full(len(turn.tokens), self.version)) for turn in made]

    monkeypatch.setattr(HFSampler, "_generate", generate)


def freshened(tiny_run: Callable[..., Any], **more: Any) -> Any:
    settings = {
        "task": {"kind": "shopping", "drift_every": 2},
        "teachers__main__context": {"kind": "replay"},
        "refresh": "none",
        "sampler__max_tokens": 40,
        "steps": 6,
        "prompts_per_step": 2,
        "max_staleness": 1,
        "credit__freshness__floor": 0.0,
    }
    return tiny_run("fresh", **{**settings, **more})


def test_supervision_drifts_where_the_table_changed_under_an_attempt(
    tiny_run: Callable[..., Any], scripted: None
) -> None:
    """At staleness 1 the attempts of step s + 1 begin when s steps are completed, except the first two. The
    table changes after 2 and 4 steps.
    """
    done = freshened(tiny_run)
    task = Shopping(drift_every=2)
    drifted = [row["credit"]["freshness"]["supervision_drift"] > 0 for row in done.rows("metrics")]
    begun = [max(0, step - 1) for step in range(6)]
    changed = [task.price("figs", begun[step]) != task.price("figs", step) for step in range(6)]
    assert drifted == changed
    assert changed == [False, False, True, False, True, False]
    shares = [row["context"]["main"]["replayed"] for row in done.rows("metrics")]
    assert shares == [float(change) for change in changed]
    saw = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert len(saw) == 12


def test_nothing_drifts_where_the_table_is_fixed_or_nothing_is_in_flight(
    tiny_run: Callable[..., Any], scripted: None
) -> None:
    for more in ({"task": {"kind": "shopping"}}, {"max_staleness": 0}):
        done = freshened(tiny_run, **more)
        assert [row["credit"]["freshness"]["supervision_drift"] for row in done.rows("metrics")] == [0.0] * 6


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_environments_are_opened_at_the_completed_steps(
    tiny_run: Callable[..., Any], scripted: None, monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    opened: list[tuple[str, int]] = []
    open_env = Shopping.open_env

    def listened(self: Any, prompt: Any, step: int) -> Any:
        opened.append((prompt.id.partition("-")[0], step))
        return open_env(self, prompt, step)

    monkeypatch.setattr(Shopping, "open_env", listened)
    freshened(
        tiny_run,
        max_staleness=max_staleness,
        steps=4,
        prompts_per_step=1,
        evals__accuracy={"problems": 1, "examples": 0},
        eval_every=2,
    )
    assert [step for split, step in opened if split == "validation"] == [0, 2, 4]
    begun = [max(0, step - max_staleness) for step in range(4)]
    assert [step for split, step in opened if split == "train"] == begun


def test_an_attempt_is_scored_first_as_of_the_moment_when_it_began() -> None:
    """Also where a step is completed while it is sampled."""
    seen: list[Any] = []

    class Sampler:
        async def sample(self, prompt: Any, n: int, draw: Any) -> Any:
            seen.append(draw.completed)
            run.step += 1
            return [Attempt(tiny.rollout(3))]

    class Answers:
        async def score(self, groups: Any, step_context: StepContext, cohort: int) -> None:
            seen.append((step_context.step, step_context.completed, step_context.version))

    def step_context(step: int, version: int) -> StepContext:
        return StepContext(step, 0, version, run.step)

    def draw(step: int, cohort: int) -> SamplingParams:
        return SamplingParams(step, "train", 9, cohort=cohort)

    cfg = SimpleNamespace(group_size=1, prompts_per_step=1, draw=draw)
    run: Any = SimpleNamespace(cfg=cfg, step=3, step_context=step_context, write=lambda *_: None)
    run.services, run.in_flight = tiny.services(), SimpleNamespace(begin=lambda ask: True)
    learner: Any = SimpleNamespace(version=7)
    attempt = attempting(run, learner, Sampler(), Rewards({}, {}), Answers())  # type: ignore[arg-type]
    asyncio.run(attempt(Ask(tiny.rollout(3).prompt, 5, 0, 1, 5, False)))
    assert seen == [3, (5, 3, 7)]


def test_the_loss_uses_the_answer_to_the_replies_of_now(
    tiny_run: Callable[..., Any], scripted: None, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Every target that a step is made with is that of the teacher for the present table."""
    from reflux.learners.gradient_learner import GradientLearner

    model = load_model(teacher, "model", dtype="float32", device="cpu")
    task, seen = Shopping(drift_every=2), []
    learn = GradientLearner.learn

    def spy(self: Any, request: Any, *more: Any) -> Any:
        seen.extend((request.step_context.step, one) for group in request.groups for one in group)
        return learn(self, request, *more)

    monkeypatch.setattr(GradientLearner, "learn", spy)
    freshened(tiny_run)
    assert [step for step, _ in seen] == [step for step in range(6) for _ in range(2)]
    for step, made in seen:
        rollout = made.rollout
        price = {"role": "user", "content": str(task.price("figs", step))}
        place = len(rollout.prompt.messages) + 1
        now = [*rollout.messages[:place], price, *rollout.messages[place + 1 :]]
        logp_NV = expected(model, rollout, now)
        own_TV = full(model, made.target("main"))
        np.testing.assert_allclose(own_TV[rollout.mask_T], logp_NV, atol=1e-4)
        saw = rollout.messages[place]["content"]
        assert saw == str(task.price("figs", max(0, step - 1)))
