"""Turns messages into token ids, finds the ids that end a turn, and compares the token maps of two models.

It does not need torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from reflux.errors import ModelError
from reflux.types import Message


class Renderer:
    """A tokenizer with its chat template. Without a template the messages' texts are joined by newlines,
    after the begin token.

    system: put before the conversation where it has no system message. template: extra arguments of the chat
    template (for example {"enable_thinking": False}). suffix: the text that ends every prompt, after the text
    with which the template opens the student's turn. An example is "<think>\n" for a base student whose
    teacher thinks. It belongs to the prompt, and the student begins after it. Where the template itself ends
    with the suffix (apart from white space at the end), nothing is added.

    The contents of messages are data and never markup. Where a content spells a control token
    (`control_tokens`), a space breaks it: "<end>" becomes "< end>". Only the template, and `system` and
    `suffix`, which are texts of the recipe, give control tokens. All other contents stay unchanged,
    character for character. A space is used because every tokenizer has one; a small vocabulary has no
    zero-width character, which would become its unknown token, a special token. The space is put into the
    text because texts that are tokenised piece by piece have other tokens at the borders, and because
    templates trim and search their inputs. Role names are not contents: the code that makes prompts chooses
    them.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        template: Mapping[str, Any] | None = None,
        suffix: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.system = system
        self.suffix = suffix or ""
        self.template = dict(template or {})

    def text(self, messages: Sequence[Message], begin_turn: bool = True) -> str:
        """The prompt as text, with control tokens in the contents broken. `begin_turn` opens the
        assistant's turn, including the suffix.
        """
        framed = self._framed([self._message(message) for message in messages], begin_turn)
        return framed + self._ending if begin_turn else framed

    @functools.cached_property
    def _ending(self) -> str:
        """The suffix; empty where the template writes it. This is tested on a fixed message and not on a
        prompt, so the text of a user has no influence.

        ModelError for a suffix that the tokenizer has no tokens for.
        """
        if not self.suffix:
            return ""
        unknown = self.tokenizer.unk_token_id
        if (
            unknown is not None
            and unknown in self.tokenizer(self.suffix, add_special_tokens=False)["input_ids"]
        ):
            raise ModelError(
                f"prompt_suffix = {self.suffix!r} has characters without a token in the tokenizer. "
                "Choose a text that the student can read, or leave prompt_suffix out."
            )
        if self.tokenizer.chat_template is None:
            return self.suffix
        opened = self._framed([{"role": "user", "content": "a"}], True)
        return (
            ""
            if opened.endswith(self.suffix) or opened.rstrip().endswith(self.suffix.strip() or self.suffix)
            else self.suffix
        )

    def _message(self, message: Message) -> Message:
        return {key: value if key == "role" else self._plain(value) for key, value in message.items()}

    def _plain(self, value: Any) -> Any:
        """`value` with control tokens broken in every text in it. Names, ids and arguments of tool calls
        are data in the same way as contents.
        """
        if isinstance(value, str):
            return self.data(value)
        if isinstance(value, Mapping):
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        return [self._plain(item) for item in value] if isinstance(value, list | tuple) else value

    def data(self, content: str, but: Collection[str] = ()) -> str:
        """`content` with a space after the first character of every control token in it, except those in
        `but`. A control token of one character is replaced by a space.
        """
        broken = self._control.sub(lambda found: found[0] if found[0] in but else _broken(found[0]), content)
        # Repeat, because tokens may overlap. Each round leaves fewer control tokens.
        return content if broken == content else self.data(broken, but)

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, control_tokens(self.tokenizer, self._frames()))) or r"(?!)")

    def _frames(self) -> str:
        """The texts that the template writes around turns, and around tool calls and their results where it
        supports them.
        """
        if self.tokenizer.chat_template is None:
            return ""
        frames = self._framed(
            [{"role": role, "content": "a"} for role in ("user", "assistant", "user")], False
        )
        try:
            return frames + self._framed(_CALLED, False)
        except (TemplateError, TypeError):
            return frames

    def _framed(self, messages: Sequence[Message], begin_turn: bool) -> str:
        messages = list(messages)
        if self.system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.tokenizer.chat_template is None:
            if any(message.get("tool_calls") for message in messages):
                raise ModelError(
                    "the model has no chat template, so tool calls cannot be shown to it. Write them into "
                    "the content"
                )
            return "\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=begin_turn, **self.template
        )

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of the prompt, up to where the student's first token begins. ModelError for a
        prompt without any token.
        """
        templated = self.tokenizer.chat_template is not None
        ids = self.tokenizer(self.text(messages), add_special_tokens=not templated)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if not templated and begin is not None and (not ids or ids[0] != begin):
            ids = [begin, *ids]
        if not ids:
            raise ModelError("a prompt has no tokens: it is empty and the tokenizer has no begin token")
        return ids

    def answer_ids(self, messages: Sequence[Message], answer: str, ends: Sequence[int]) -> list[int]:
        """The ids of a given answer as the student would have written it, up to and including its end token.
        ends: the ids that end a turn.

        Where the answer begins with the suffix, the suffix is left out, because the prompt ends with it. An
        end token that the answer spells ends it. Any other control token in it is data, as in all contents.
        """
        written = answer.removeprefix(self.suffix)
        answer = self.data(written, but=self.tokenizer.convert_ids_to_tokens(list(ends)))
        # Only the part of `whole` after `start` is used.
        start = self._framed(messages, True)
        whole = self._framed([*messages, {"role": "assistant", "content": answer}], False)
        rest = (
            whole.removeprefix(start)
            if self.tokenizer.chat_template is not None and whole.startswith(start)
            else answer
        )
        ids = self.tokenizer(rest, add_special_tokens=False)["input_ids"]
        stop = next((place for place, i in enumerate(ids) if i in ends), None)
        return [*ids, ends[0]] if stop is None else ids[: stop + 1]

    def reply_ids(
        self, before: Sequence[Message], replies: Sequence[Message], closed: bool = True
    ) -> list[int]:
        """The ids that follow an ended assistant turn: the messages of tools or users, and the opening of
        the next turn.

        `before` ends with the assistant's turn. closed: True if its tokens include the end token. Otherwise
        a stop text ended it, and the ids begin with the text that the template writes there. ModelError
        where the template rewrites earlier turns, because the ids would then not continue them.
        """
        start, whole = self.text(before, begin_turn=False), self.text([*before, *replies])
        if not whole.startswith(start.rstrip()):
            raise ModelError(
                "the chat template rewrites earlier turns when a reply is added, so a reply cannot be "
                "appended to the sampled tokens. Choose template arguments that keep earlier turns "
                "unchanged (for example thinking kept in the history)."
            )
        # White space after the end token belongs to the following ids, because the student stopped at the
        # end token itself.
        rest = whole[len(start.rstrip()) :]
        return self.tokenizer(rest if closed else self._closing + rest, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def _closing(self) -> str:
        """The text that the template writes after an assistant's text, without white space at its end."""
        return self._framed(_ENDED, False).partition(_MARKER)[2].rstrip()


def control_tokens(tokenizer: Any, frame: str) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, longest first, without white space around them.

    They are its special tokens, and the added tokens in `frame`, the texts that a chat template writes
    around turns, because some tokenizers do not declare their "<|User|>" special. Added tokens that are
    words, single characters, white space or tags such as <think> and <tool_call> are not among them: models
    write these themselves, and templates search for them.
    """
    added = tokenizer.added_tokens_decoder.values()
    declared = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    framing = {
        token.content for token in added if token.content in frame and not _ORDINARY.fullmatch(token.content)
    }
    return tuple(
        sorted({token.strip() for token in declared | framing} - {""}, key=lambda token: (-len(token), token))
    )


def _broken(token: str) -> str:
    return f"{token[0]} {token[1:]}" if len(token) > 1 else " "


_ORDINARY = re.compile(r"\s+|\w+|.|</?\w+>")
_MARKER = "reflux end of turn"
_ENDED: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKER}]
_CALL = {"type": "function", "id": "a", "function": {"name": "a", "arguments": {"a": "a"}}}
_CALLED: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "a", "tool_call_id": "a", "name": "a"},
]


def end_ids(tokenizer: Any, generation: Any = None) -> tuple[int, ...]:
    """Every id that ends a turn, from the tokenizer, the generation config and the chat template's end of
    turn.
    """
    found: set[int] = set()
    declared = getattr(generation, "eos_token_id", None)
    found.update([declared] if isinstance(declared, int) else declared or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        found.update(_template_end(tokenizer))
    if not found:
        raise ModelError(
            "the model has no end-of-text token, in its tokenizer or its generation config: answers would "
            "never end"
        )
    return tuple(sorted(found))


def _template_end(tokenizer: Any) -> list[int]:
    """The first special token after an assistant's text in the template, if there is one."""
    _, found, after = tokenizer.apply_chat_template(_ENDED, tokenize=False).partition(_MARKER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [i for i in ids[:1] if i in set(tokenizer.all_special_ids)]


def special_ids(tokenizer: Any, ends: Collection[int]) -> frozenset[int]:
    """The ids that the tokenizer declares special, except `ends`, the ids that end a turn. Decoding leaves
    them out of a text.

    Added tokens that are not declared special, such as <think> in some families, are text and not among these
    ids.
    """
    declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((declared | set(tokenizer.all_special_ids)) - set(ends))


def vocabulary_size(tokenizer: Any) -> int:
    """The number of real tokens: the largest id + 1. Output rows beyond it are padding and never a token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokens(student: Any, teacher: Any, name: str) -> None:
    """Raise ModelError where the teacher's token map differs from the student's, with the first ids that
    differ.

    The maps are compared, and not only their sizes, because models of one family can differ in a few added
    tokens.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    if ours == theirs:
        return
    differing = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    shown = "; ".join(f"id {i}: student {ours.get(i)!r}, teacher {theirs.get(i)!r}" for i in differing[:3])
    raise ModelError(
        f"teachers.{name}: its token map differs from the student's in {len(differing)} ids ({shown}). "
        "Token-level distillation needs equal maps. "
        f"Choose a teacher of the student's family, or train on the teacher's written answers (recipe sft)."
    )
