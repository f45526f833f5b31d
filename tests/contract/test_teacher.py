"""Teachers: who is asked about what, on which tokens, and that only one token map will do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from device import here
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import TeacherPrompt
from reflux.errors import DataError, ModelError
from reflux.models.text import as_model
from reflux.teachers.collection import Teachers
from reflux.teachers.local import Local
from reflux.teachers.local_engine import LocalTeacher
from reflux.types import Attempt, HiddenTarget, TeacherAnswer, TopKTarget
from tiny import ask, attempt, rollout, same

CHAT = {"kind": "outside:Chat"}
NOW = StepContext(0, 0)


def local(net: Any, requirements: Requirements = Requirements(), **fields: Any) -> LocalTeacher:
    return LocalTeacher(
        Local("m", **fields),
        tiny.context(requirements),
        tiny.services(),
        as_model(net, character_tokenizer()),
    )


def score(teacher: LocalTeacher, attempts: list[Attempt], view: TeacherPrompt | None = None) -> None:
    asyncio.run(ask(teacher, *((a, view or TeacherPrompt(a.rollout.prompt.messages)) for a in attempts)))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_the_teacher_says_what_its_model_says_along_the_students_tokens(
    batch_tokens: int, pack: bool
) -> None:
    net = tiny.net(2, layers=2)
    attempts = [Attempt(rollout(n, seed=n, prompt_tokens=3 + n % 4)) for n in (1, 9, 4, 6)]
    teacher = local(net, Requirements(logp=True), batch_tokens=batch_tokens)
    assert teacher.padded_because
    if pack:
        teacher.padded_because = ""
    score(teacher, attempts)
    for made in attempts:
        spoken, target = made.rollout, made.target("main")
        ids = np.concatenate([spoken.prompt_tokens, spoken.tokens_T])
        with torch.no_grad():
            logp_TV = (
                net(input_ids=here(ids)[None])
                .logits[0, len(spoken.prompt_tokens) - 1 : -1]
                .log_softmax(-1)
                .cpu()
            )
            assert isinstance(target, HiddenTarget)
            torch.testing.assert_close(
                tiny.HEADS[target.head].logits(target.h_TH).log_softmax(-1).cpu(),
                logp_TV,
                rtol=1e-4,
                atol=1e-4,
            )
        np.testing.assert_allclose(target.logp_T, logp_TV[range(spoken.length), spoken.tokens_T], atol=1e-4)


def test_a_teacher_that_exceeds_the_memory_reads_less_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, fits = tiny.Heard(), 24
    teacher = LocalTeacher(
        Local("m", batch_tokens=100),
        tiny.context(Requirements(logp=True)),
        tiny.services(listener=heard),
        as_model(tiny.net(2), character_tokenizer()),
    )
    whole, again = ([Attempt(rollout(n, seed=n)) for n in (9, 4, 6, 12)] for _ in range(2))
    score(teacher, whole)
    read = teacher._read

    def bounded(requests: Any, inputs: Any) -> Any:
        if len(inputs) * max(len(reading.ids_L) for reading in inputs) > fits:
            raise torch.OutOfMemoryError("out of memory")
        return read(requests, inputs)

    monkeypatch.setattr(teacher, "_read", bounded)
    score(teacher, again)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one.target("main").logp_T, other.target("main").logp_T, atol=1e-5)
    assert [note.split(" from")[0] for note in heard.notes] == [
        "teachers.main.batch_tokens: 50",
        "teachers.main.batch_tokens: 25",
    ]
    fits = 3
    with pytest.raises(ModelError, match="one text of 16 tokens does not fit"):
        score(teacher, [Attempt(rollout(12, seed=12))])


def test_log_probs_and_candidates_are_made_only_where_wanted() -> None:
    from dataclasses import replace

    spoken = rollout(5, seed=1)
    listed = np.random.default_rng(0).integers(0, 102, (5, 3))
    behaviour = TopKTarget(
        teacher="behaviour", ids_TK=listed, logp_TK=np.zeros((5, 3), np.float32), logp_T=spoken.logp_T
    )
    plain, asked = (
        Attempt(replace(spoken, behaviour=behaviour)),
        Attempt(replace(spoken, behaviour=behaviour)),
    )
    score(local(tiny.net(2)), [plain])
    score(local(tiny.net(2), Requirements(candidates=3, behaviour=3)), [asked])
    assert plain.target("main").logp_T is None
    assert plain.answers["main"].candidates is None
    target = asked.target("main")
    with torch.no_grad():
        logp_TV = tiny.HEADS[target.head].logits(target.h_TH).log_softmax(-1).cpu()
    np.testing.assert_allclose(
        asked.answers["main"].candidates.logp_TK, logp_TV.gather(-1, torch.from_numpy(listed)), atol=1e-5
    )
    np.testing.assert_allclose(asked.answers["main"].candidates.logp_T, asked.target("main").logp_T)
    # an evaluation's attempt comes without a list
    mixed = [Attempt(spoken), Attempt(replace(spoken, behaviour=behaviour))]
    score(local(tiny.net(2), Requirements(candidates=3)), mixed)
    assert mixed[0].answers["main"].candidates is None
    np.testing.assert_allclose(
        mixed[1].answers["main"].candidates.logp_TK, asked.answers["main"].candidates.logp_TK, atol=1e-5
    )
    np.testing.assert_allclose(
        mixed[0].target("main").logp_T, asked.target("main").logp_T, rtol=1e-6, atol=1e-5
    )


def test_another_view_changes_the_prompt_and_never_the_answer() -> None:
    net = tiny.net(2)
    made, spoken = Attempt(rollout(4, seed=1)), rollout(4, seed=1)
    messages = ({"role": "system", "content": "the answer is 7"}, {"role": "user", "content": "q"})
    score(local(net, Requirements(logp=True)), [made], TeacherPrompt(messages))
    prompt = character_tokenizer().apply_chat_template(list(messages), add_generation_prompt=True)[
        "input_ids"
    ]
    ids = np.concatenate([prompt, spoken.tokens_T])
    with torch.no_grad():
        logp_TV = net(input_ids=here(ids)[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
    np.testing.assert_allclose(made.target("main").logp_T, logp_TV[range(4), spoken.tokens_T], atol=1e-4)


def test_what_does_not_fit_the_teacher_is_refused_in_words() -> None:
    with pytest.raises(
        ModelError, match=r"takes? .* tokens|take 604 tokens, but the model's context window holds 512"
    ):
        score(local(tiny.net(2)), [Attempt(rollout(600, seed=1))])


# --- all of them


class Counting:
    """A teacher that counts what it is asked."""

    parameters = 10

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def score(self, requests: Any) -> list[TeacherAnswer]:
        self.asked += [(request.rollout.prompt.id, request.rollout.sample) for request in requests]
        model = as_model(tiny.net(2), character_tokenizer())
        return [TeacherAnswer(target=tiny.hidden(model, request.rollout)) for request in requests]

    def save(self, folder: Path) -> None:
        (folder / "asked").write_text(str(len(self.asked)))

    def load(self, folder: Path) -> None:
        self.loaded = (folder / "asked").read_text()


class Saying:
    """A context that can be told what to show."""

    min_group = 1
    requirements = Requirements()

    def __init__(self) -> None:
        self.word: str | None = "a"

    def __call__(self, group: Any, step_context: StepContext) -> list[TeacherPrompt | None]:
        return [
            None if self.word is None else TeacherPrompt(({"role": "user", "content": self.word},))
            for _ in group
        ]


def table(context: Any, **fields: Any) -> Any:
    return SimpleNamespace(
        context=context,
        routes=fields.get("routes", ()),
        alias=fields.get("alias"),
        in_process=fields.get("in_process", False),
        scorer=lambda opened: None,
    )


def test_scoring_is_idempotent_and_asks_again_only_where_the_context_changed() -> None:
    context, answers = Saying(), Counting()
    teachers = Teachers({"main": (table(context), answers)}, Requirements(), tiny.services())
    group = [attempt(rollout(3, seed=1, sample=s)) for s in range(2)]
    for word, calls in (("a", 2), ("a", 2), ("b", 4), (None, 4), ("b", 4), ("a", 6)):
        context.word = word
        asyncio.run(teachers.score([group], NOW))
        assert len(answers.asked) == calls, word
    assert group[0].answers["main"].previous is not None


def test_empty_and_failed_attempts_are_not_asked() -> None:
    answers = Counting()
    teachers = Teachers({"main": (table(Saying()), answers)}, Requirements(), tiny.services())
    asyncio.run(
        teachers.score(
            [[attempt(rollout(0)), attempt(rollout(3, finish="error"))], [attempt(rollout(2))], []], NOW
        )
    )
    assert len(answers.asked) == 1


def test_a_teacher_with_state_is_in_the_checkpoint_under_its_table(tmp_path: Path) -> None:
    one, other = Counting(), Counting()
    teachers = Teachers(
        {"main": (table(Saying()), one), "second": (table(Saying()), other)}, Requirements(), tiny.services()
    )
    one.asked.append(("x", 0))
    teachers.save(tmp_path)
    assert {path.name: (path / "asked").read_text() for path in tmp_path.iterdir()} == {
        "main": "1",
        "second": "0",
    }
    teachers.load(tmp_path)
    assert (one.loaded, other.loaded) == ("1", "0")


def test_two_tables_are_one_teacher_by_route(
    tiny_run: Callable[..., Any], teacher: str, student: str
) -> None:
    """Each prompt asks exactly one of them; the student is its own teacher for the odd ones, so those cost
    nothing.
    """
    routed = {
        "main": "none",
        "good": {"kind": "local", "model": teacher, "alias": "main", "routes": ["even"]},
        "home": {"kind": "local", "model": student, "alias": "main", "routes": ["odd"]},
    }
    done = tiny_run("full", steps=1, task=CHAT, teachers=routed, learner__micro_batch_tokens=1)
    gaps = {}
    for row in (row for row in done.rows("attempts") if row["kind"] == "learned"):
        gap = np.abs(np.asarray(row["teacher_logp"]["main"]) - np.asarray(row["student_logp"]))
        gaps.setdefault(int(row["prompt"].split("-")[1]) % 2, []).append(gap.max())
    assert max(gaps[1]) < 1e-4
    assert min(gaps[0]) > 0.1
    assert done.rows("metrics")[0]["without_target"] == {"main": 0}


def test_a_route_that_nobody_serves_is_refused_also_where_the_task_did_not_tell_it(
    tiny_run: Callable[..., Any],
) -> None:
    with pytest.raises(
        DataError,
        match=r"prompt train-\d+ has the route 'odd', .* serve only even\. Add that route to a teacher table",
    ):
        tiny_run("full", steps=1, task={**CHAT, "tells_routes": False}, teachers__main__routes=["even"])


# --- one token map


def test_another_token_map_is_refused_with_the_first_ids_that_differ(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    other = character_tokenizer()
    other.add_tokens(["<new>", "<newer>"])
    net = tiny.net(2, padded_rows=2)
    net.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError) as refused:
        tiny_run("full", teachers__main__model=str(tmp_path / "other"))
    assert "teachers.main: its token map differs from the student's in 2 ids" in str(refused.value)
    assert "id 102: student None, teacher '<new>'" in str(refused.value)


def test_two_tokens_swapped_at_equal_size_are_noticed() -> None:
    from reflux.models.chat.token_map import check_same_tokens

    map_ = character_tokenizer().get_vocab()
    map_["a"], map_["b"] = map_["b"], map_["a"]
    with pytest.raises(ModelError, match=r"differs .* in 2 ids \(id .*: student '[ab]', teacher '[ab]'"):
        check_same_tokens(character_tokenizer(), SimpleNamespace(get_vocab=lambda: map_), "main")
    check_same_tokens(character_tokenizer(), character_tokenizer(), "main")


@pytest.mark.parametrize("recipe", ["full", "topk", "vopd"])
def test_padded_output_rows_are_cut_on_either_side(
    tiny_run: Callable[..., Any], student: str, tmp_path: Path, recipe: str
) -> None:
    """They would be chosen nearly always, were they not cut. A student with padding is exact against one
    without, at identity.
    """
    wide = tiny.save(tiny.net(1, padded_rows=5), tmp_path / "wide")
    done = tiny_run(recipe, steps=1, task=CHAT, learner__model=wide)
    tokens = [token for row in done.rows("attempts") if row["kind"] == "attempt" for token in row["tokens"]]
    assert max(tokens) < 102
    narrow = tiny.net(1, padded_rows=5)
    narrow.resize_token_embeddings(102)
    home = tiny_run(
        recipe,
        steps=1,
        task=CHAT,
        learner__model=wide,
        teachers__main__model=tiny.save(narrow, tmp_path / "narrow"),
    )
    assert abs(home.rows("metrics")[0]["kl_nats_trained"]) < 1e-5
    plain = tiny_run(recipe, steps=2, task=CHAT, learner__model=str(tmp_path / "narrow"))
    padded = tiny_run(recipe, steps=2, task=CHAT, learner__model=wide)
    assert plain.rows("metrics")[1]["loss"] == pytest.approx(padded.rows("metrics")[1]["loss"], rel=1e-4)


def test_padding_is_never_learnt(tmp_path: Path) -> None:
    net = tiny.net(1, padded_rows=5)
    before = net.get_input_embeddings().weight[102:].clone()
    from reflux.objectives.nll import NLL

    learner = tiny.learner(net, lr=0.1)
    tiny.move(learner, [[attempt(rollout(5))]], [NLL()])
    assert same({"rows": before}, {"rows": net.get_input_embeddings().weight[102:].detach()})
