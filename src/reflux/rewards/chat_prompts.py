"""The prompts of rewards that ask a language model. They are files, and a recipe may name others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.errors import DataError
from reflux.rewards.marked import Marked, marked, tag_of
from reflux.types import Message

SHIPPED = Path(__file__).parent / "prompts"
# The texts that each prompt must contain.
REQUIRED: dict[str, frozenset[str]] = {
    "rubric": frozenset({"question", "references", "students"}),
    "verdicts": frozenset({"question", "rubric", "answers"}),
    "score": frozenset({"question", "answers"}),
    "preference": frozenset({"question", "answers"}),
}


def prompt_text(name: str, path: str | None) -> str:
    """The text of a prompt: that of the file `path`, else the shipped one. DataError for a file that cannot
    be read or that leaves out a text which the model must see.
    """
    import jinja2.meta
    from jinja2.sandbox import SandboxedEnvironment

    file = Path(path).expanduser() if path else SHIPPED / f"{name}.txt"
    try:
        text = file.read_text(encoding="utf-8")
        used = jinja2.meta.find_undeclared_variables(SandboxedEnvironment().parse(text))
    except (OSError, ValueError, jinja2.TemplateError) as error:
        raise DataError(f"the prompt {file} cannot be read ({error}).") from error
    if missing := sorted(REQUIRED[name] - used):
        words = " and ".join(f"{{{{ {word} }}}}" for word in missing)
        raise DataError(f"the prompt {file} leaves out {words}, which the model must see. Add it.")
    return text


def filled(text: str, entries: Mapping[str, Sequence[Marked]], numbers: dict[str, int]) -> str:
    """A prompt with its texts, each between markers with one tag for the whole prompt. Values are inserted
    and never read as a template.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    tag = tag_of([entry.text for group in entries.values() for entry in group])
    values: dict[str, Any] = {name: marked(group, tag) or "(none)" for name, group in entries.items()}
    return SandboxedEnvironment(undefined=StrictUndefined).from_string(text).render(values | numbers)


def question_of(messages: Sequence[Message]) -> str:
    """The question that answers are judged by: the only message, besides the system's, or the whole
    conversation with the name of each speaker.
    """
    spoken = [message for message in messages if message["role"] != "system"]
    if len(spoken) == 1:
        return str(spoken[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def labelled(label: str, texts: Collection[str]) -> list[Marked]:
    """Texts with numbered labels, such as "Answer 1"."""
    return [Marked(f"{label} {number}", text) for number, text in enumerate(texts, start=1)]
