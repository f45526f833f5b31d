"""Turns messages into the token ids that a model reads. It does not need torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from reflux.errors import ModelError
from reflux.models.chat.answers import closing_text, completed, last_text, without_opening
from reflux.models.chat.contents import as_text
from reflux.models.chat.continuation import bare_ids, begin_ids, continued_ids
from reflux.models.chat.control import Data
from reflux.models.chat.ends import closing_id
from reflux.models.chat.shown import Shown
from reflux.models.chat.template import ChatTemplate
from reflux.types import Message


class Renderer:
    """A tokenizer with its chat template. Without a template the messages' texts are joined by newlines,
    after the begin token.

    system: put before the conversation where it has no system message. template: extra arguments of the chat
    template (for example {"enable_thinking": False}). suffix: the text that ends every prompt, after the text
    with which the template opens the student's turn. An example is "<think>\\n" for a base student whose
    teacher thinks. It belongs to the prompt, and the student begins after it. Where the template itself ends
    with the suffix (apart from white space at the end), nothing is added.

    The contents of messages are data and never markup (`Data`). Only the template, and `system` and `suffix`,
    which are texts of the recipe, give control tokens. The tags that a model writes (`written_tags`) stay in
    the contents of assistant messages.

    ModelError, with the template's own words, for messages that the template does not take.
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
        self.template = ChatTemplate(tokenizer, template)
        self._shown = Shown(self.template)

    def text(self, messages: Sequence[Message], begin_turn: bool = True) -> str:
        """The prompt as text, with control tokens in the contents broken. `begin_turn` opens the
        assistant's turn, including the suffix.
        """
        return self._text(self._messages(messages), begin_turn)

    def _text(self, made: Sequence[Message], begin_turn: bool = True) -> str:
        """made: messages as `_messages` gives them."""
        framed = self.template.write(made, begin_turn)
        return framed + self._ending if begin_turn else framed

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of the prompt, up to where the student's first token begins. An end token that the
        tokenizer adds to every text is left out.

        ModelError for a prompt without any token, and for contents or tool calls that the template does not
        show.
        """
        made = self._messages(messages)
        ids = bare_ids(self.tokenizer, self._text(made))
        self._shown.check(made)
        if not self.template.exists:
            ids = [*begin_ids(self.tokenizer), *ids]
            begin = self.tokenizer.bos_token_id
            if begin is not None and (not ids or ids[0] != begin):
                ids = [begin, *ids]
        if not ids:
            raise ModelError("a prompt has no tokens: it is empty and the tokenizer has no begin token")
        return ids

    def answer_ids(self, messages: Sequence[Message], answer: str, ends: Sequence[int]) -> list[int]:
        """The ids of a given answer as the student would have written it, up to and including its end token.
        ends: the ids that end a turn.

        Where the answer begins with the text that ends the prompt (the suffix, or the tag that opens
        thinking), that text is left out. An end token that the answer spells ends it. Any other control token
        in it is data, as in all contents, except the tags that a model writes. Where the template would leave
        out a part of the answer, as many leave out thinking, the answer itself stands behind the prompt.
        """
        made = self._messages(messages)
        prompt = self._text(made)
        kept = {*self.tokenizer.convert_ids_to_tokens(list(ends)), *self.data.tags}
        answer = self.data.text(without_opening(answer, prompt, self.suffix), kept)
        rest = completed(self.template, made, prompt, answer, self._closing)
        ids = continued_ids(self.tokenizer, prompt, rest)
        stop = next((place for place, i in enumerate(ids) if i in ends), None)
        return [*ids, closing_id(self.template, ends)] if stop is None else ids[: stop + 1]

    def reply_ids(
        self, before: Sequence[Message], replies: Sequence[Message], closed: bool = True
    ) -> list[int]:
        """The ids that follow an ended assistant turn: the messages of tools or users, and the opening of
        the next turn.

        `before` ends with the assistant's turn. closed: True if its tokens include the end token. Otherwise
        a stop text ended it, and the ids begin with the text that the template writes there. ModelError
        where the template rewrites earlier turns, because the ids would then not continue them.
        """
        # White space after the end token belongs to the following ids, because the student stopped at the
        # end token itself.
        end = self._closing.rstrip()
        written = self.text(before, begin_turn=False).removesuffix(self._last)
        written = written.removesuffix(self._closing[len(end) :])
        made = self._messages([*before, *replies])
        whole = self._text(made)
        # Some templates show the system message in the last turn of the user, wherever that is.
        asked = self.template.written(self._messages(before[:-1])).removesuffix(self._last)
        if not whole.startswith(written) or not whole.startswith(asked):
            raise ModelError(
                "the chat template rewrites earlier turns when a reply is added, so a reply cannot be "
                "appended to the sampled tokens. Choose template arguments that keep earlier turns "
                "unchanged (for example thinking kept in the history)."
            )
        self._shown.check(made)
        written = written if closed else written.removesuffix(end)
        return continued_ids(self.tokenizer, written, whole[len(written) :])

    @functools.cached_property
    def _closing(self) -> str:
        return closing_text(self.template)

    @functools.cached_property
    def _last(self) -> str:
        return last_text(self.template)

    @functools.cached_property
    def data(self) -> Data:
        return Data(self.tokenizer, self.template)

    def _messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as data, after the system text of the recipe where they have none."""
        made = [self.data.message(as_text(message)) for message in messages]
        if self.system and not any(message["role"] == "system" for message in made):
            return [{"role": "system", "content": self.system}, *made]
        return made

    @functools.cached_property
    def _ending(self) -> str:
        """The suffix; empty where the template writes it. This is tested on a fixed message and not on a
        prompt, so the text of a user has no influence.

        ModelError for a suffix that the tokenizer has no tokens for.
        """
        if not self.suffix:
            return ""
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in bare_ids(self.tokenizer, self.suffix):
            raise ModelError(
                f"prompt_suffix = {self.suffix!r} has characters without a token in the tokenizer. "
                "Choose a text that the student can read, or leave prompt_suffix out."
            )
        if not self.template.exists:
            return self.suffix
        opened = self.template.write(self._messages([{"role": "user", "content": "a"}]), True)
        return (
            ""
            if opened.endswith(self.suffix) or opened.rstrip().endswith(self.suffix.strip() or self.suffix)
            else self.suffix
        )
