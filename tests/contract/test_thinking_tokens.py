"""Tags of thinking that a tokenizer declares special: they stay in texts and in what an assistant wrote."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from reflux.models.chat.ends import end_ids
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.tags import Decoding, opened_thinking, written_tags
from reflux.models.spans import CharacterSpans
from tokenizer_kinds import KINDS, MARKED, byte_level

ASK = [{"role": "user", "content": "2 + 3?"}]
THOUGHT = "<think>hello world</think>It is 19."


def thinker(kind: str = "byte-level", special: bool = True) -> Any:
    tokenizer, tags = KINDS[kind](MARKED), ("<think>", "</think>")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *tags]})
    else:
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer


@pytest.mark.parametrize(
    ("tag", "thinks"),
    [
        *[
            (tag, True)
            for tag in ("<think>", "</think>", "<thinking>", "[THINK]", "[/THINK]", "<seed:think>")
        ],
        *[(tag, True) for tag in ("<|begin_of_thought|>", "</reasoning>", "<|think|>", "◁/think▷")],
        *[
            (tag, False)
            for tag in ("<s>", "</s>", "[INST]", "<|im_end|>", "<user>", "<|Thoughtless|>", "think")
        ],
    ],
)
def test_tags_of_thinking_are_known_by_their_name(tag: str, thinks: bool) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [tag]})
    assert (tag in written_tags(tokenizer).values()) == thinks


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_shows_where_thinking_ends(kind: str, special: bool) -> None:
    tokenizer = thinker(kind, special)
    ids = Renderer(tokenizer).answer_ids(ASK, THOUGHT, end_ids(tokenizer, None))
    text = Decoding(tokenizer)(ids)
    thought, _, rest = text.partition("</think>")
    assert "".join(thought.split()) == "<think>helloworld"
    assert "".join(rest.split()) == "Itis19."
    assert tokenizer.convert_tokens_to_ids("</think>") in ids


def test_pairs_of_tags_that_the_template_does_not_write_are_what_a_model_writes() -> None:
    tokenizer = byte_level(MARKED.replace("{{ m.content }}", "<turn>{{ m.content }}</turn>"))
    names = ["<answer>", "</answer>", "<turn>", "</turn>", "<alone>", "<s>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    assert set(written_tags(tokenizer).values()) == {"<answer>", "</answer>"}
    ids = tokenizer("<turn><answer>5</answer><alone></turn>")["input_ids"]
    assert Decoding(tokenizer)(ids) == "<answer>5</answer>"


def test_other_special_tokens_are_left_out_as_ever() -> None:
    tokenizer = thinker()
    ids = tokenizer("<s><|im_start|><think>a</think>b<|im_end|></s>")["input_ids"]
    assert Decoding(tokenizer)(ids) == "<think>a</think>b"
    assert Decoding(tokenizer)(tokenizer("<s>a<|im_end|>")["input_ids"]) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tags_have_their_own_spans(kind: str) -> None:
    tokenizer = thinker(kind)
    spans = CharacterSpans(tokenizer)
    ids = Renderer(tokenizer).answer_ids(ASK, THOUGHT, end_ids(tokenizer, None))
    text = spans.decode(ids)
    shown = {i: text[start:end] for i, (start, end) in zip(ids, spans(ids), strict=True)}
    for index, tag in written_tags(tokenizer).items():
        assert shown[index].strip() == tag
    assert shown[ids[-1]] == ""


def test_an_assistant_thinks_and_a_user_only_spells_it() -> None:
    tokenizer = thinker()
    messages = [
        {"role": "user", "content": THOUGHT},
        {"role": "assistant", "content": f"{THOUGHT}<|im_end|>"},
        {"role": "user", "content": "so?"},
    ]
    text = Renderer(tokenizer).text(messages)
    assert "user\n< think>hello world< /think>It is 19.<|im_end|>" in text
    assert f"assistant\n{THOUGHT}< |im_end|><|im_end|>" in text


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("a<think>\n", ("<think>", "\n")),
        ("[THINK]", ("[THINK]", "")),
        # The end of the token before it is not a part of the tag.
        ("<|Assistant|><think>\n", ("<think>", "\n")),
        ("[/INST][THINK]", ("[THINK]", "")),
        ("<|end|><|begin_of_thought|>", ("<|begin_of_thought|>", "")),
        ("<think>\n\n</think>\n\n", ("", "")),
        ("a<assistant>", ("", "")),
        ("<think> so", ("", "")),
    ],
)
def test_a_prompt_opens_thinking_only_at_its_end(prompt: str, opened: tuple[str, str]) -> None:
    assert opened_thinking(prompt) == opened


# As in Qwen3: a turn shows empty thinking where its text has none.
EMPTY = MARKED.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}",
)
# As in DeepSeek-R1: the prompt opens thinking right after a token, and turns show no thinking.
DROPS = MARKED.replace("assistant\n{% endif %}", "assistant<|im_end|><think>\n{% endif %}").replace(
    "{{ m.content }}", "{{ m.content.split('</think>') | last }}"
)
# As in Nemotron 3: prompts have a line break after the tag, and turns without thinking do not.
TIGHT = MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}{{ m.content }}",
)


@pytest.mark.parametrize(
    ("template", "suffix", "answer", "written"),
    [
        (EMPTY, None, "It is 19.", "<think>\n\n</think>\n\nIt is 19."),
        (EMPTY, "<think>\n", "It is 19.", "\n</think>\n\nIt is 19."),
        (EMPTY, "<think>\n", "<think>\nhello</think>It is 19.", "hello</think>It is 19."),
        (DROPS, None, "<think>\nhello</think>It is 19.", "hello</think>It is 19."),
        (DROPS, None, "<think>hello</think>It is 19.", "hello</think>It is 19."),
        (TIGHT, None, "It is 19.", "</think>It is 19."),
        (TIGHT, None, "<think>\nhello</think>It is 19.", "hello</think>It is 19."),
    ],
)
def test_a_given_answer_opens_thinking_once_and_closes_it_as_the_template_does(
    template: str, suffix: str | None, answer: str, written: str
) -> None:
    tokenizer = thinker(special=False)
    tokenizer.chat_template = template
    ids = Renderer(tokenizer, suffix=suffix).answer_ids(ASK, answer, end_ids(tokenizer, None))
    assert tokenizer.decode(ids) == f"{written}<|im_end|>"
