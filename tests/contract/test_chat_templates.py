"""What chat templates refuse, leave out or add: it is said in words, and no content is lost in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from reflux.errors import ModelError
from reflux.models.chat.ends import end_ids, template_ends
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.template_checks import closing_end, first_difference, prints_clock, unread_arguments
from tokenizer_kinds import MARKED, byte_level

ASK = [{"role": "user", "content": "2 + 3?"}]
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "c", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c"},
]
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
)


def renderer(own: Any, **settings: Any) -> Renderer:
    """own: the template of the tokenizer."""
    return Renderer(byte_level(own), **settings)


# --- refusals


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([SYSTEM, *ASK], "no system role"),
        ([*ASK, *ASK], "roles must alternate"),
        ([{"role": "user", "content": "\ud83d"}], "TypeError"),
    ],
)
def test_a_refusal_has_the_templates_own_words_and_names_the_prompt(messages: Any, words: str) -> None:
    template = STRICT.replace(
        "{{ m.content }}", "{{ m.content + 1 if m.content == '\ufffd' else m.content }}"
    )
    with pytest.raises(ModelError) as refused, about_prompt("q7"):
        renderer(template).text(messages)
    assert words in str(refused.value)
    assert "prompt q7: the chat template" in str(refused.value)
    assert "template = {chat_template = TEXT}" in str(refused.value)


def test_a_system_text_of_the_recipe_is_refused_alike() -> None:
    with pytest.raises(ModelError, match=r"roles: system, user.*no system role"):
        renderer(STRICT, system="Be brief.").ids(ASK)


def test_a_malformed_template_is_refused_with_the_ends() -> None:
    with pytest.raises(ModelError, match=r"is malformed: unexpected '}'\. Correct it"):
        end_ids(byte_level("{% for m in messages %}{{ m.content }"), None)


def test_a_template_that_takes_no_example_has_no_known_end() -> None:
    tokenizer = byte_level("{{ raise_exception('tools only') }}")
    assert template_ends(tokenizer) == ()
    assert end_ids(tokenizer, None) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("closing", "end"), [("<|turn|>", "<|turn|>"), ("<|turn|></s>", "</s>"), ("\n</s>", None), ("", None)]
)
def test_the_end_of_a_turn_may_be_special_in_the_file_of_the_tokenizer_alone(
    closing: str, end: str | None
) -> None:
    tokenizer = byte_level(MARKED.replace("<|im_end|>", closing))
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)], special_tokens=True)
    assert "<|turn|>" not in tokenizer.all_special_tokens
    assert tokenizer.convert_ids_to_tokens(list(template_ends(tokenizer))) == [end] * (end is not None)


def test_of_several_templates_without_a_default_one_must_be_named() -> None:
    several = {"short": MARKED, "strict": STRICT.replace("<|im_end|>", "</s>")}
    with pytest.raises(ModelError, match=r"several chat templates \(short, strict\).*chat_template = NAME"):
        renderer(several).ids(ASK)
    named = renderer(several, template={"chat_template": "short"})
    assert named.ids(ASK) == renderer(MARKED).ids(ASK)
    # All of them may be named, so the ends of all are ends.
    turn = named.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(end_ids(named.tokenizer, None)) == {turn, named.tokenizer.eos_token_id}


def test_a_template_of_the_recipe_serves_a_model_without_one() -> None:
    named = renderer(None, template={"chat_template": MARKED})
    assert named.ids(ASK) == renderer(MARKED).ids(ASK)


# --- nothing is left out


EACH = "{% for m in messages %}"
WITHOUT_SYSTEM = MARKED.replace(EACH, "{% for m in messages if m.role != 'system' %}")
WITHOUT_TOOL = TOOLS.replace(EACH, "{% for m in messages if m.role != 'tool' %}")
WITHOUT_ARGUMENTS = TOOLS.replace("{{ call.function.arguments | tojson }}", "")
CALL_OR_CONTENT = TOOLS.replace("{{ m.content or '' }}", "{{ '' if m.tool_calls else m.content }}")
BOTH = [*ASK, {**CALLING[1], "content": "I look."}, CALLING[2]]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (WITHOUT_SYSTEM, [SYSTEM, *ASK], "the content of messages with the role 'system'"),
        (MARKED, CALLING, "the name of a tool call"),
        (WITHOUT_ARGUMENTS, CALLING, "the arguments of a tool call"),
        (WITHOUT_TOOL, CALLING, "the content of messages with the role 'tool'"),
        (CALL_OR_CONTENT, BOTH, "the content of messages with the role 'assistant' that also call tools"),
    ],
)
def test_what_a_template_does_not_show_is_refused(template: str, messages: Any, what: str) -> None:
    with pytest.raises(ModelError, match=f"the chat template does not show {what}"):
        renderer(template).ids(messages)


def test_a_reply_that_the_template_does_not_show_is_refused() -> None:
    made = renderer(WITHOUT_TOOL)
    with pytest.raises(ModelError, match="does not show the content of messages with the role 'tool'"):
        made.reply_ids([*ASK, {"role": "assistant", "content": "5"}], [{"role": "tool", "content": "no"}])


# As in Mistral: the system message stands in the last message, if that is one of the user.
LAST = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{% if loop.last and m.role == 'user' "
    "and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
)


def test_a_reply_that_moves_the_system_message_is_refused() -> None:
    answered = [*ASK, {"role": "assistant", "content": "5"}]
    made, reply = renderer(LAST), [{"role": "user", "content": "so?"}]
    assert made.reply_ids(answered, reply)
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        made.reply_ids([SYSTEM, *answered], reply)


def test_an_end_token_after_the_last_turn_alone_does_not_stand_before_a_reply() -> None:
    """As in Phi-3."""
    made = renderer(MARKED + "{% if not add_generation_prompt %}</s>{% endif %}")
    answered, reply = [*ASK, {"role": "assistant", "content": "5"}], [{"role": "user", "content": "so?"}]
    ends = [made.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids = [*made.ids(ASK), *made.answer_ids(ASK, "5", ends), *made.reply_ids(answered, reply)]
    assert ids == made.ids([*answered, *reply])
    assert made.tokenizer.decode(ids).count("</s>") == 0


def test_what_a_template_shows_is_taken() -> None:
    assert "weather" in renderer(TOOLS).tokenizer.decode(renderer(TOOLS).ids(CALLING))
    assert "Be brief." in renderer(MARKED).tokenizer.decode(renderer(MARKED).ids([SYSTEM, *ASK]))


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city":"Oslo"}'])
def test_arguments_given_as_json_text_are_not_quoted_again(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [*ASK, {**CALLING[1], "tool_calls": [call]}, CALLING[2]]
    assert 'weather({"city": "Oslo"})' in renderer(TOOLS).text(messages)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_template_that_wants_arguments_as_text_gets_the_text() -> None:
    template = TOOLS.replace("{{ call.function.arguments | tojson }}", "{{ '<' + call.function.arguments }}")
    text = json.dumps({"city": "Oslo"})
    call = {**CALL, "function": {"name": "weather", "arguments": text}}
    assert f"weather(<{text})" in renderer(template).text([*ASK, {**CALLING[1], "tool_calls": [call]}])


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ m.content.strip() }}", "{{ m.content or '' }}"])
def test_a_call_without_a_text_writes_no_none(content: str) -> None:
    template = TOOLS.replace("{{ m.content or '' }}", content)
    text = renderer(template).text([{"role": "user", "content": "None?"}, *CALLING[1:]])
    assert "assistant\nweather(" in text
    assert text.count("None") == 1


def test_a_template_that_knows_calls_by_the_content_none_gets_it() -> None:
    template = TOOLS.replace("m.tool_calls", "(m.tool_calls if m.content is none else [])")
    assert "weather(" in renderer(template).text(CALLING)


@pytest.mark.parametrize("template", [MARKED, None])
def test_contents_in_parts_are_one_text(template: str | None) -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]
    assert renderer(template).ids([{"role": "user", "content": parts}]) == renderer(template).ids(ASK)
    for content in ([{"type": "image", "url": "a.png"}], 5, [5]):
        with pytest.raises(ModelError, match="neither a text nor a list of texts"):
            renderer(template).ids([{"role": "user", "content": content}])
    with pytest.raises(ModelError, match="a message with the role 'user' has no content"):
        renderer(template).ids([{"role": "user", "content": None}])


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message", "padding"])
def test_arguments_that_are_not_the_templates_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"template: {name} is no argument of a chat template"):
        renderer(MARKED, template={name: True})


# --- answers

HIDES = MARKED.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
# As Qwen3: thinking of the last turn is written again, with other white space.
TIDIES = MARKED.replace(
    "{{ m.content }}",
    "{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}",
)
OPENS = HIDES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "answer", "learnt"),
    [
        (HIDES, "<think>I count.</think>It is 5.", "<think>I count.</think>It is 5."),
        (TIDIES, "<think>I count.</think>It is 5.", "<think>\nI count.\n</think>\n\nIt is 5."),
        (OPENS, "<think>\nI count.</think>It is 5.", "I count.</think>It is 5."),
        (OPENS, "<think>I count.</think>It is 5.", "I count.</think>It is 5."),
        (OPENS, "I count.</think>It is 5.", "I count.</think>It is 5."),
        (MARKED.replace("{{ m.content }}", "{{ m.content | trim }}"), " It is 5.\n", "It is 5."),
        (STRICT.replace("{{ m.content }}", "{{ m.content | replace('is', '') }}"), "It is 5.", "It is 5."),
    ],
)
def test_what_is_learnt_is_what_was_given(template: str, answer: str, learnt: str) -> None:
    made = renderer(template)
    ids = made.answer_ids(ASK, answer, end_ids(made.tokenizer, None))
    assert made.tokenizer.decode(ids) == f"{learnt}<|im_end|>"


# --- what is known before a run

CLOCK = "{% set day = date_string if date_string is defined else strftime_now('%d') %}{{ day }}" + MARKED


def test_a_template_that_prints_the_clock_is_found() -> None:
    assert prints_clock(renderer(CLOCK), ASK)
    assert not prints_clock(renderer(CLOCK, template={"date_string": "1 May"}), ASK)
    assert not prints_clock(renderer(MARKED), ASK)
    assert not prints_clock(renderer("{% if strftime_now is defined %}{% endif %}" + MARKED), ASK)


def test_a_prompt_that_ends_with_an_end_token_is_found() -> None:
    """The template does not open the assistant's turn."""
    unopened = MARKED.partition("{% if add_generation_prompt")[0]
    ends = end_ids(byte_level(unopened), None)
    shown, opened = renderer(unopened), renderer(MARKED)
    found = closing_end(shown.tokenizer, shown.ids(ASK), ends)
    assert shown.tokenizer.convert_ids_to_tokens(found) == "<|im_end|>"
    assert closing_end(opened.tokenizer, opened.ids(ASK), ends) is None


def test_the_first_difference_of_two_prompts_is_told() -> None:
    ours, theirs = renderer(MARKED), renderer(MARKED, system="Be brief.")
    assert first_difference(ours, renderer(MARKED), ASK) is None
    told = first_difference(ours, theirs, ASK)
    assert told is not None
    assert "from token 1 on" in told
    assert "the student reads 'user\\n" in told
    assert "the teacher 'system\\n" in told
    longer = first_difference(ours, renderer(MARKED, suffix="So: "), ASK)
    assert longer is not None
    assert "the student reads nothing, the teacher 'So: '" in longer


def test_template_arguments_that_nothing_reads_are_found() -> None:
    given = {"enable_thinkng": False, "day": "1"}
    assert unread_arguments(renderer("{{ day }}" + MARKED, template=given)) == ["enable_thinkng"]
    assert unread_arguments(renderer(None, template=given)) == ["day", "enable_thinkng"]
    for thinking, template, unread in (
        (False, MARKED, []),
        (False, None, []),
        (True, MARKED, ["enable_thinking"]),
        (False, MARKED + "<think>", ["enable_thinking"]),
    ):
        made = renderer(template, template={"enable_thinking": thinking})
        assert unread_arguments(made) == unread
    own = {"chat_template": "{{ day }}" + MARKED, "day": "1"}
    assert unread_arguments(renderer(None, template=own)) == []
