"""Messages to ids: templates, turns, ends."""

from __future__ import annotations

from typing import Any

import pytest

from reflux.assets.tokenizer import character_tokenizer
from reflux.errors import ModelError
from reflux.tokens import Renderer, end_ids, vocabulary_size

ASK = ({"role": "user", "content": "2+3?"},)


def plain(**fields: Any) -> Any:
    """A base model's tokenizer: no chat template."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    return tokenizer


def words(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_prompt_ends_where_the_student_begins() -> None:
    tokenizer = character_tokenizer()
    assert words(tokenizer, Renderer(tokenizer).ids(ASK)) == "<user>2+3?<assistant>"
    assert words(tokenizer, Renderer(tokenizer, system="be brief").ids(ASK)) == "<system>be brief<user>2+3?<assistant>"
    own = ({"role": "system", "content": "x"}, *ASK)
    assert words(tokenizer, Renderer(tokenizer, system="be brief").ids(own)) == "<system>x<user>2+3?<assistant>"


def test_template_arguments_reach_the_template() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking %}<assistant>{% endif %}"
    assert words(tokenizer, Renderer(tokenizer, template={"enable_thinking": True}).ids(ASK)) == "2+3?<assistant>"
    assert words(tokenizer, Renderer(tokenizer, template={"enable_thinking": False}).ids(ASK)) == "2+3?"


def test_without_a_template_texts_are_joined_after_the_begin_token() -> None:
    two = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    assert words(plain(), Renderer(plain()).ids(two)) == "a\nb"
    assert words(plain(), Renderer(plain(bos_token="<pad>")).ids(two)) == "<pad>a\nb"
    assert Renderer(plain(bos_token="<pad>")).ids(({"role": "user", "content": ""},)) == [0]


def test_a_prompt_of_no_token_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match="renders to no token at all: it is empty and the tokenizer has no begin token"):
        Renderer(plain()).ids(({"role": "user", "content": ""},))


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("answer", ["5", "", "a b\n"])
def test_a_given_answer_is_what_the_student_would_have_written(templated: bool, answer: str) -> None:
    tokenizer = character_tokenizer() if templated else plain()
    ids = Renderer(tokenizer).answer_ids(ASK, answer, end_ids(tokenizer))
    assert words(tokenizer, ids) == answer.replace("\n", "\n") + "<end>"


def test_an_answer_goes_no_further_than_its_first_end() -> None:
    tokenizer = character_tokenizer()
    assert words(tokenizer, Renderer(tokenizer).answer_ids(ASK, "5<end>6", end_ids(tokenizer))) == "5<end>"


def test_a_reply_continues_the_tokens_that_are_there() -> None:
    tokenizer = character_tokenizer()
    before = (*ASK, {"role": "assistant", "content": "5"})
    reply = Renderer(tokenizer).reply_ids(before, ({"role": "tool", "content": "no"},))
    assert words(tokenizer, reply) == "<user>no<assistant>"
    whole = Renderer(tokenizer).ids((*before, {"role": "tool", "content": "no"}))
    assert [*Renderer(tokenizer).ids(ASK), *tokenizer("5<end>", add_special_tokens=False)["input_ids"], *reply] == whole


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        Renderer(tokenizer).reply_ids((*ASK, {"role": "assistant", "content": "5"}), ({"role": "user", "content": "x"},))


def test_ends_come_from_tokenizer_generation_config_and_template() -> None:
    from types import SimpleNamespace

    tokenizer = character_tokenizer()
    assert end_ids(tokenizer) == (1,)
    assert end_ids(tokenizer, SimpleNamespace(eos_token_id=[1, 3])) == (1, 3)
    assert end_ids(tokenizer, SimpleNamespace(eos_token_id=4)) == (1, 4)
    assert end_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == (1,)
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "<system>")
    assert end_ids(tokenizer) == (1, 3)
    with pytest.raises(ModelError, match="no end-of-text token"):
        end_ids(plain(eos_token=None))


def test_the_vocabulary_is_the_largest_id_and_one() -> None:
    tokenizer = character_tokenizer()
    assert vocabulary_size(tokenizer) == 102
    tokenizer.add_tokens(["<new>"])
    assert vocabulary_size(tokenizer) == 103
