"""A text that ends every prompt, such as the opening of thinking: it belongs to the prompt, once, for whoever
renders it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import tiny
from laws.test_own_rng import PROMPTS, ask, sampled
from reflux.assets.characters import TEMPLATE, character_tokenizer
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.models.chat.ends import end_ids, special_ids
from reflux.models.chat.renderer import Renderer
from reflux.teachers import in_process_teacher

CHAT = {"kind": "outside:Chat"}
ASK = ({"role": "user", "content": "2+3?"},)
THINK = "<think>\n"
OPENED = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")


def thinker(template: str | None = TEMPLATE, special: bool = True) -> Any:
    """The character tokenizer with tokens for thinking, declared special or not."""
    tokenizer = character_tokenizer()
    if special:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<system>", "<user>", "<assistant>", "<think>", "</think>"]}
        )
    else:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def words(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("special", [True, False])
def test_a_suffix_ends_the_prompt_after_the_turn_is_opened(special: bool) -> None:
    tokenizer = thinker(special=special)
    ids = Renderer(tokenizer, suffix=THINK).ids(ASK)
    assert words(tokenizer, ids) == "<user>2+3?<assistant><think>\n"
    assert ids == [
        *Renderer(tokenizer).ids(ASK),
        tokenizer.convert_tokens_to_ids("<think>"),
        tokenizer.convert_tokens_to_ids("\n"),
    ]
    assert (
        Renderer(tokenizer, suffix="").ids(ASK)
        == Renderer(tokenizer, suffix=None).ids(ASK)
        == Renderer(tokenizer).ids(ASK)
    )


def test_a_suffix_need_not_be_made_of_tokens_of_its_own() -> None:
    tokenizer = character_tokenizer()
    assert (
        words(tokenizer, Renderer(tokenizer, suffix="Let me see: ").ids(ASK))
        == "<user>2+3?<assistant>Let me see: "
    )


@pytest.mark.parametrize("suffix", [THINK, "<think>", "\n<think>", "<think>\n\n"])
def test_a_template_that_opens_thinking_itself_is_left_as_it_is(suffix: str) -> None:
    tokenizer = thinker(OPENED)
    assert words(tokenizer, Renderer(tokenizer, suffix=suffix).ids(ASK)) == "<user>2+3?<assistant><think>\n"


def test_it_is_the_template_that_is_asked_and_not_what_a_user_says() -> None:
    """A question that ends like the suffix opens nothing, without a template either."""
    ask = ({"role": "user", "content": "what is <think>\n"},)
    for template, expected in (
        (TEMPLATE, "<user>what is <think>\n<assistant><think>\n"),
        (None, "what is <think>\n<think>\n"),
    ):
        tokenizer = thinker(template, special=False)
        assert words(tokenizer, Renderer(tokenizer, suffix=THINK).ids(ask)) == expected


def test_a_base_student_without_a_template_gets_it_too() -> None:
    tokenizer = thinker(None)
    assert words(tokenizer, Renderer(tokenizer, suffix="\n<think>\n").ids(ASK)) == "2+3?\n<think>\n"


def test_white_space_alone_may_end_a_prompt() -> None:
    tokenizer = character_tokenizer()
    assert words(tokenizer, Renderer(tokenizer, suffix="\n").ids(ASK)) == "<user>2+3?<assistant>\n"
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant>\n{% endif %}")
    assert words(tokenizer, Renderer(tokenizer, suffix="\n").ids(ASK)) == "<user>2+3?<assistant>\n"


def test_every_turn_of_the_student_is_opened_with_it_and_no_other_text_ends_with_it() -> None:
    tokenizer = thinker()
    renderer = Renderer(tokenizer, suffix=THINK)
    before = (*ASK, {"role": "assistant", "content": "5"})
    assert (
        words(tokenizer, renderer.reply_ids(before, ({"role": "tool", "content": "no"},)))
        == "<user>no<assistant><think>\n"
    )
    assert renderer.text(before, begin_turn=False) == "<user>2+3?<assistant>5<end>"


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("answer", ["5", "<think>\n5"])
def test_a_given_answer_is_written_from_behind_the_suffix(template: str | None, answer: str) -> None:
    tokenizer = thinker(template)
    renderer = Renderer(tokenizer, suffix=THINK)
    assert words(tokenizer, renderer.answer_ids(ASK, answer, end_ids(tokenizer, None))) == "5<end>"
    # Elsewhere a tag of thinking is what the student writes, and any other control token is data.
    spelt = renderer.answer_ids(ASK, "5<think>\n<user>", end_ids(tokenizer, None))
    assert words(tokenizer, spelt) == "5<think>\n< user><end>"


def test_a_suffix_that_the_tokenizer_cannot_write_is_refused() -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(
        ModelError, match=r"prompt_suffix = '<thinké>' has characters without a token in the tokenizer"
    ):
        Renderer(tokenizer, suffix="<thinké>").ids(ASK)


def test_a_user_who_spells_the_suffix_gives_no_control_token() -> None:
    tokenizer = thinker()
    ids = Renderer(tokenizer, suffix=THINK).ids(({"role": "user", "content": "<think>2"},))
    assert words(tokenizer, ids) == "<user>< think>2<assistant><think>\n"


# --- who reads it

SEE = "See: "


def ids_of(text: str) -> list[int]:
    return character_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("purpose", ["train", "eval", "score"])
def test_the_sampler_begins_behind_it(student: str, teacher: str, tmp_path: Path, purpose: Any) -> None:
    """It is the end of the prompt and no part of the answer; everything else of the prompt stays."""
    plain, suffixed = (
        [
            attempt.rollout
            for group in sampled(
                tiny.config("opd", student, teacher, task=CHAT, **more),
                tmp_path / name,
                lambda acting: ask(acting, PROMPTS, 1, SamplingParams(0, purpose, 9)),
            )
            for attempt in group
        ]
        for name, more in (("plain", {}), ("suffixed", {"learner__prompt_suffix": SEE}))
    )
    for one, other in zip(plain, suffixed, strict=True):
        assert other.prompt_tokens.tolist() == [*one.prompt_tokens, *ids_of(SEE)]
        assert not other.text.startswith(SEE)
    # it was read
    assert [one.text for one in plain] != [other.text for other in suffixed]


CONTEXTS = {"same": {"kind": "same"}, "another": {"kind": "privileged"}}
TEACHERS = {"local": {"kind": "local", "model": "", "system": "be brief"}, "self": {"kind": "self"}}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_teacher_reads_the_same_end_of_the_prompt(
    tiny_run: Callable[..., Any], teacher: str, monkeypatch: pytest.MonkeyPatch, kind: str, context: str
) -> None:
    """Whether it reads the student's own prompt, or renders another one from other messages: once, right
    before the answer.
    """
    seen = []
    read_by = in_process_teacher.read_by

    def spy(name: str, request: Any, *rest: Any) -> Any:
        read = read_by(name, request, *rest)
        seen.append((request.rollout, read.ids_L[: read.first].tolist(), read.ids_L[read.first :].tolist()))
        return read

    monkeypatch.setattr(in_process_teacher, "read_by", spy)
    table = {**TEACHERS[kind], "context": CONTEXTS[context]} | ({"model": teacher} if kind == "local" else {})
    tiny_run("full", steps=1, task=CHAT, learner__prompt_suffix=SEE, teachers={"main": table})
    assert seen
    opening = character_tokenizer().convert_tokens_to_ids("<assistant>")
    for rollout, prompt, answer in seen:
        assert rollout.prompt_tokens.tolist()[-6:] == [opening, *ids_of(SEE)]
        assert prompt[-6:] == [opening, *ids_of(SEE)]
        assert character_tokenizer().decode(prompt).count(SEE) == 1
        assert answer == rollout.tokens_T[:-1].tolist()
        assert (prompt == rollout.prompt_tokens.tolist()) == (context == "same")


def test_given_answers_follow_it(student: str, teacher: str, tmp_path: Path) -> None:
    """A reference that begins with it is not told twice."""
    cfg = tiny.config("sft", student, teacher, task=CHAT, learner__prompt_suffix=SEE)
    prompts = [replace(PROMPTS[0], references=(answer,)) for answer in ("ok", f"{SEE}ok")]
    groups = sampled(
        cfg, tmp_path / "run", lambda acting: ask(acting, prompts, 1, SamplingParams(0, "train", 9))
    )
    for (attempt,) in groups:
        assert attempt.rollout.prompt_tokens.tolist()[-5:] == ids_of(SEE)
        assert attempt.rollout.tokens_T.tolist() == [*ids_of("ok"), character_tokenizer().eos_token_id]


# --- which tokens are special


def test_special_tokens_are_the_declared_ones_that_end_no_turn() -> None:
    tokenizer = character_tokenizer()
    names = {
        tokenizer.convert_ids_to_tokens(index) for index in special_ids(tokenizer, end_ids(tokenizer, None))
    }
    assert names == {"<pad>", "<unk>", "<system>", "<user>", "<assistant>"}
    thinking = thinker()
    found = special_ids(thinking, end_ids(thinking, None))
    assert set(thinking.convert_tokens_to_ids(["<think>", "</think>"])) <= found
    assert thinking.eos_token_id not in found
    assert special_ids(
        thinking, (*end_ids(thinking, None), thinking.convert_tokens_to_ids("</think>"))
    ) == found - {thinking.convert_tokens_to_ids("</think>")}


def test_what_is_special_is_what_decoding_leaves_out() -> None:
    """Added tokens that are not declared special are text."""
    for tokenizer in (character_tokenizer(), thinker(), thinker(special=False)):
        declared = special_ids(tokenizer, ())
        for index in range(len(tokenizer)):
            assert (tokenizer.decode([index], skip_special_tokens=True) == "") == (index in declared)


def test_reflux_eval_asks_a_run_as_the_run_did(tmp_path: Path) -> None:
    from reflux.cli.evaluate import _table

    behaviour = {"system": "Be brief.", "template": {"think": True}, "prompt_suffix": "<think>"}
    own = {
        "steps": 1,
        "task": {"kind": "word_problems"},
        "sampler": {"kind": "hf"},
        "learner": {"kind": "hf", "lr": 1e-3, **behaviour},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(own))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    assert _table(str(tmp_path))["learner"] == {"model": str(tmp_path), **behaviour}
