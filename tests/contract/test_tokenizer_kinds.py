"""Prompts, answers and replies continue one another as the whole text would be tokenised, for every kind of
tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from reflux.models.chat.continuation import begin_ids, continued_ids
from reflux.models.chat.ends import end_ids
from reflux.models.chat.renderer import Renderer
from tokenizer_kinds import KINDS, MARKED, TIGHT, WORDED, byte_level, sentence_pieces

ASK = ({"role": "user", "content": "Ann has 12 pears. How many?"},)
ANSWER = "It is 19.\nhello world"
TEMPLATES = {"marked": MARKED, "worded": WORDED, "tight": TIGHT}


def whole_ids(tokenizer: Any, messages: Any, begin_turn: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin_turn)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def stripped(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids).split())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_are_the_ids_of_the_whole_text(kind: str, template: str) -> None:
    tokenizer = KINDS[kind](TEMPLATES[template])
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    ids = [*renderer.ids(ASK), *renderer.answer_ids(ASK, ANSWER, ends)]
    whole = whole_ids(tokenizer, [*ASK, said(ANSWER)])
    assert ids[-1] in ends
    assert whole[: len(ids)] == ids
    # At most the line break that the template writes after the end.
    assert stripped(tokenizer, whole[len(ids) :]) == ""


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_of_many_turns_is_the_ids_of_the_whole_text(kind: str, template: str) -> None:
    tokenizer = KINDS[kind](TEMPLATES[template])
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    messages, ids = list(ASK), renderer.ids(ASK)
    for turn in range(3):
        answer, reply = f"It is {turn}.", {"role": "user", "content": f"no, {turn + 2}"}
        ids += renderer.answer_ids(messages, answer, ends)
        messages.append(said(answer))
        ids += renderer.reply_ids(messages, [reply])
        messages.append(reply)
    assert ids == whole_ids(tokenizer, messages, begin_turn=True)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_that_a_stop_text_ended_goes_on_as_the_whole_text(kind: str, template: str) -> None:
    tokenizer = KINDS[kind](TEMPLATES[template])
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    messages, reply = [*ASK, said("It is 19.")], {"role": "user", "content": "no"}
    answer = renderer.answer_ids(ASK, "It is 19.", ends)[:-1]
    rest = renderer.reply_ids(messages, [reply], closed=False)
    text = tokenizer.decode([*renderer.ids(ASK), *answer, *rest])
    expected = tokenizer.decode(whole_ids(tokenizer, [*messages, reply], begin_turn=True))
    assert "".join(text.split()) == "".join(expected.split())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_an_answer_gets_no_space_that_nobody_wrote(kind: str) -> None:
    tokenizer = KINDS[kind]()
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    ask = ({"role": "user", "content": "2 + 3 ="},)
    ids = [*renderer.ids(ask), *renderer.answer_ids(ask, "hello", ends)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id
    if kind != "word pieces":
        assert text.strip() == "2 + 3 =hello"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("border", ["\n", " ", "", "a", "1", ".", "="])
def test_a_token_across_the_border_changes_no_character(kind: str, border: str) -> None:
    if kind == "word pieces":
        pytest.skip("it has no white space")
    tokenizer, before = KINDS[kind](), f"hello{border}"
    for text in (f"{border}world", "\nworld", " world", "12", "."):
        known = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = continued_ids(tokenizer, before, text)
        assert tokenizer.decode([*known, *ids]).strip() == (before + text).strip()


def test_byte_level_answers_have_the_ids_of_their_own_text() -> None:
    tokenizer = byte_level(MARKED)
    ids = Renderer(tokenizer).answer_ids(ASK, ANSWER, end_ids(tokenizer, None))
    assert ids == tokenizer(f"{ANSWER}<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_that_the_tokenizer_adds_to_every_text_ends_no_prompt(kind: str) -> None:
    tokenizer = KINDS[kind]()
    plain = Renderer(tokenizer).ids(ASK)
    names = ("<s>", "</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id
    assert Renderer(tokenizer).ids(ASK) == plain
    assert begin_ids(tokenizer) == [tokenizer.bos_token_id]
    assert plain[0] == tokenizer.bos_token_id
    # Between turns neither.
    tokenizer.chat_template = MARKED
    ids = Renderer(tokenizer).reply_ids([*ASK, said("5")], ASK)
    assert tokenizer.eos_token_id not in ids


def test_an_answer_without_a_template_ends_with_the_tokenizers_own_end() -> None:
    """Another id that also ends a turn may be lower."""
    tokenizer = sentence_pieces()
    ends = (tokenizer.unk_token_id, tokenizer.eos_token_id)
    assert Renderer(tokenizer).answer_ids(ASK, "5", ends)[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = MARKED
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Renderer(tokenizer).answer_ids(ASK, "5", (tokenizer.eos_token_id, turn))[-1] == turn


def test_a_tokenizer_in_python_that_adds_its_end() -> None:
    """ByT5's: one token for each byte, and it needs no files."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    assert tokenizer("é")["input_ids"][-1] == tokenizer.eos_token_id
    assert renderer.ids([{"role": "user", "content": "é"}]) == [byte + 3 for byte in "é".encode()]
    assert renderer.answer_ids(ASK, "5", ends) == [ord("5") + 3, tokenizer.eos_token_id]
