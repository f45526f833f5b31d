"""The token ids that end a turn, and the special ids that do not."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError

from reflux.errors import ModelError
from reflux.models.chat.template import ENDED, MARKER, ChatTemplate


def end_ids(tokenizer: Any, generation: Any) -> tuple[int, ...]:
    """Every id that ends a turn, from the tokenizer, the generation config and the chat template's end of
    turn. generation: the generation config of the model; None if it has none.

    ModelError if there is no such id, or if the chat template is malformed.
    """
    found = set(declared_ends(generation))
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    found.update(template_ends(tokenizer))
    if not found:
        raise ModelError(
            "the model has no end-of-text token, in its tokenizer or its generation config: answers would "
            "never end"
        )
    return tuple(sorted(found))


def declared_ends(generation: Any) -> tuple[int, ...]:
    """The end ids in a generation config; () if it has none."""
    declared = getattr(generation, "eos_token_id", None)
    return (declared,) if isinstance(declared, int) else tuple(declared or ())


def template_ends(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The special token that the chat template writes right after an assistant's text; () if it writes none.
    Where it writes several, the end token of the tokenizer if it is one of them, else the first.
    Where a tokenizer has several templates without a default, one id for each. arguments: as in
    `ChatTemplate`.
    """
    several = tokenizer.chat_template
    arguments = dict(arguments or {})
    if isinstance(several, dict) and "default" not in several and "chat_template" not in arguments:
        named = [template_ends(tokenizer, {**arguments, "chat_template": name}) for name in sorted(several)]
        return tuple(dict.fromkeys(i for ends in named for i in ends))
    _, found, after = _answered(ChatTemplate(tokenizer, arguments)).partition(MARKER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    special = declared_special(tokenizer)
    closing = list(itertools.takewhile(lambda i: i in special, ids))
    return (tokenizer.eos_token_id,) if tokenizer.eos_token_id in closing else tuple(closing[:1])


def _answered(template: ChatTemplate) -> str:
    """The text of an answered question; "" where the template does not take one. ModelError for a template
    that is no program.
    """
    try:
        return template.write(ENDED, False) if template.exists else ""
    except ModelError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise
        return ""


def closing_id(template: ChatTemplate, ends: Sequence[int]) -> int:
    """The one of `ends` that closes a written answer: that of the template, else that of the tokenizer, else
    the first.
    """
    tokenizer = template.tokenizer
    preferred = (*template_ends(tokenizer, template.arguments), tokenizer.eos_token_id)
    return next((i for i in preferred if i in ends), ends[0])


def special_ids(tokenizer: Any, ends: Collection[int]) -> frozenset[int]:
    """The ids that the tokenizer declares special, except `ends`, the ids that end a turn. Decoding leaves
    them out of a text, except the tags that a model writes (`Decoding`).

    Added tokens that are not declared special, such as <think> in some families, are text and not among these
    ids.
    """
    return frozenset(declared_special(tokenizer) - set(ends))


def declared_special(tokenizer: Any) -> set[int]:
    """The ids that are special by their own declaration or by their part, such as the begin token. The first
    alone holds for tokens that only `tokenizer.json` declares.
    """
    declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return declared | set(tokenizer.all_special_ids)
