"""Texts of messages are data: control tokens that they spell are broken."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from reflux.models.chat.surrogates import whole_characters
from reflux.models.chat.tags import written_tags
from reflux.models.chat.template import ChatTemplate
from reflux.types import Message

_ORDINARY = re.compile(r"\s+|\w+|.|</?\w+>")


class Data:
    """Breaks the control tokens (`control_tokens`) in contents with a space: "<end>" becomes "< end>". Half
    of a surrogate pair becomes U+FFFD. All other contents stay unchanged, character for character.

    A space is used because every tokenizer has one; a small vocabulary has no zero-width character, which
    would become its unknown token, a special token. The space is put into the text because texts that are
    tokenised piece by piece have other tokens at the borders, and because templates trim and search their
    inputs.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate):
        tokens = control_tokens(tokenizer, template.frames)
        self.control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        # An assistant writes these itself, so they stay in its contents.
        self.tags = frozenset(written_tags(tokenizer).values())

    def message(self, message: Message) -> Message:
        """The message with its contents as data. Role names are not contents: the code that makes prompts
        chooses them.
        """
        kept = self.tags if message["role"] == "assistant" else ()
        return {key: value if key == "role" else self._plain(value, kept) for key, value in message.items()}

    def _plain(self, value: Any, kept: Collection[str]) -> Any:
        """Names, ids and arguments of tool calls are data in the same way as contents."""
        if isinstance(value, str):
            return self.text(value, kept)
        if isinstance(value, Mapping):
            return {self._plain(key, kept): self._plain(item, kept) for key, item in value.items()}
        return [self._plain(item, kept) for item in value] if isinstance(value, list | tuple) else value

    def text(self, content: str, but: Collection[str] = ()) -> str:
        """`content` with a space after the first character of every control token in it, except those in
        `but`. A control token of one character is replaced by a space.
        """
        content = whole_characters(content)
        broken = self.control.sub(lambda found: found[0] if found[0] in but else _broken(found[0]), content)
        # Repeat, because tokens may overlap. Each round leaves fewer control tokens.
        return content if broken == content else self.text(broken, but)


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
