"""Messages -> token ids, which ids end a turn, and whether two models share one token map. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reflux.errors import ModelError
from reflux.types import Message


class Renderer:
    """A tokenizer with its chat template. Without a template the messages' texts are joined by newlines, after the begin token.

    system: put before the conversation where it has no system message. template: extra arguments of the chat template (for example
    {"enable_thinking": False}).
    """

    def __init__(self, tokenizer: Any, system: str | None = None, template: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.system = system
        self.template = dict(template or {})

    def text(self, messages: Sequence[Message], begin_turn: bool = True) -> str:
        """The prompt as text; `begin_turn` opens the assistant's turn."""
        messages = list(messages)
        if self.system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.tokenizer.chat_template is None:
            return "\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_turn, **self.template)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that end where the student's first token begins. A prompt without any token is refused."""
        templated = self.tokenizer.chat_template is not None
        ids = self.tokenizer(self.text(messages), add_special_tokens=not templated)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if not templated and begin is not None and (not ids or ids[0] != begin):
            ids = [begin, *ids]
        if not ids:
            raise ModelError("a prompt renders to no token at all: it is empty and the tokenizer has no begin token")
        return ids

    def answer_ids(self, messages: Sequence[Message], answer: str, ends: Sequence[int]) -> list[int]:
        """The ids of a given answer as the student would have written it, up to and with its end token."""
        start = self.text(messages)
        whole = self.text([*messages, {"role": "assistant", "content": answer}], begin_turn=False)
        rest = whole.removeprefix(start) if self.tokenizer.chat_template is not None and whole.startswith(start) else answer
        ids = self.tokenizer(rest, add_special_tokens=False)["input_ids"]
        stop = next((place for place, i in enumerate(ids) if i in ends), None)
        return [*ids, ends[0]] if stop is None else ids[: stop + 1]

    def reply_ids(self, before: Sequence[Message], replies: Sequence[Message]) -> list[int]:
        """The ids that follow an ended assistant turn: what tools or users say, and the opening of the next turn.

        `before` ends with the assistant's turn. Refused where the template rewrites earlier turns (the text would not continue).
        """
        start, whole = self.text(before, begin_turn=False), self.text([*before, *replies])
        if not whole.startswith(start.rstrip()):
            raise ModelError(
                "the chat template rewrites earlier turns once a reply is added, so a reply cannot be appended to the tokens "
                "that were sampled. Choose template arguments that keep them (for example thinking kept in the history)."
            )
        # Trailing white space after the end token belongs to what follows: the student stopped at the end token itself.
        return self.tokenizer(whole[len(start.rstrip()) :], add_special_tokens=False)["input_ids"]


def end_ids(tokenizer: Any, generation: Any = None) -> tuple[int, ...]:
    """Every id that ends a turn: from the tokenizer, the generation config, and the chat template's own end of turn."""
    found: set[int] = set()
    declared = getattr(generation, "eos_token_id", None)
    found.update([declared] if isinstance(declared, int) else declared or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        found.update(_template_end(tokenizer))
    if not found:
        raise ModelError("the model names no end-of-text token, in its tokenizer or its generation config: answers would never end")
    return tuple(sorted(found))


def _template_end(tokenizer: Any) -> list[int]:
    """The first special token after an assistant's text in the template, if there is one."""
    marker = "reflux end of turn"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    _, found, after = tokenizer.apply_chat_template(turns, tokenize=False).partition(marker)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [i for i in ids[:1] if i in set(tokenizer.all_special_ids)]


def vocabulary_size(tokenizer: Any) -> int:
    """Real tokens: the largest id + 1. Output rows beyond it are padding and never a token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokens(student: Any, teacher: Any, name: str) -> None:
    """Refuse a teacher whose token map differs from the student's, with the first ids that differ.

    The maps are compared, not their sizes: models of one family can differ in a handful of added tokens.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    if ours == theirs:
        return
    differing = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    shown = "; ".join(f"id {i}: student {ours.get(i)!r}, teacher {theirs.get(i)!r}" for i in differing[:3])
    raise ModelError(
        f"teachers.{name}: its token map differs from the student's in {len(differing)} ids ({shown}). Distilling by token needs one map: "
        f"choose a teacher of the student's family, or train on the teacher's written answers (recipe sft)."
    )
