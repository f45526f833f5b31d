"""Prompts of a user, one JSON object per line, from a local file or a dataset of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from reflux.config.importable import importable
from reflux.config.registry import STRICT, did_you_mean, load
from reflux.errors import DataError
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.lines import endless, held_out, hub_lines, make_prompts, read_lines
from reflux.types import FlowRollout, Message, Prompt, Reward, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

KEYS = ("prompt", "messages", "answer", "references", "route", "id")
# the keys of a message that are kept
_OF_MESSAGES = ("role", "content", "tool_calls", "tool_call_id", "name")
GRADERS = ("math", "exact", "none")


@dataclass(frozen=True, config=STRICT)
class Jsonl(TaskPart):
    """Prompts from lines of {"prompt" or "messages", "answer", "references", "route", "id"}.

    Each line needs "prompt" or "messages"; the other keys are optional. prompt: one user message. messages: a
    chat, [{"role", "content"}, ...], that ends before the turn of the student. If tools were called, messages
    have "tool_calls" (the content may then be null), "tool_call_id" and "name". answer: text or a number.
    references: worked answers, for the `references` sampler. route: selects the teacher (default: the field
    `route` of this task). id: stable and unique (default: "train/17", the number of the line).

    path: the file. dataset (with dataset_config and dataset_split): a dataset on the hub, instead of path.
    keys: the names of these columns in the file if they differ, e.g. {prompt = "question"}. Other columns are
    ignored. validation: a share of the lines, held out by a hash of their id; or the name of a file (on the
    hub: of a split) that is the validation set. test: the file (on the hub: the split) of test lines. Without
    it, "test" is the validation set. instruction: appended to the last message after a blank line. grader:
    "math" (see `reflux.grading.math`), "exact" (equal text or final answer, ignoring differences of white
    space), "none", or "my_module:function". This function is called with (prompt, text or image of the
    student) and returns a number from 0 to 1, or a Reward. makes: "text", or "image" for flow models. An
    image needs a grader of the user, which gets uint8 [height, width(, 3)].

    "train" never ends: a new order in each epoch. DataError, with file and line, for data that cannot be
    used.
    """

    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    keys: dict[str, str] | None = None
    validation: float | str = 0.05
    test: str | None = None
    instruction: str = ""
    grader: str = "math"
    makes: Literal["text", "image"] = "text"
    route: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                "set exactly one of path (a file of JSON lines) and dataset (a name on the Hugging Face hub)"
            )
        for key in self.keys or {}:
            if key not in KEYS:
                raise ValueError(
                    f"keys gives a column to '{key}'{did_you_mean(key, KEYS)}. Known: {', '.join(KEYS)}"
                )
        if not isinstance(self.validation, str) and not 0 <= self.validation < 1:
            raise ValueError(
                "validation is a share of the lines (0 <= validation < 1), or the name of a separate file"
            )
        if self.grader not in GRADERS and ":" not in self.grader:
            raise ValueError(
                f"grader must be one of {', '.join(GRADERS)}, or "
                f'"my_module:function"{did_you_mean(self.grader, GRADERS)}'
            )
        if self.makes == "image" and self.grader in ("math", "exact"):
            raise ValueError(
                f'grader "{self.grader}" judges texts. For images use "my_module:function", or "none"'
            )
        if not self.weight > 0:
            raise ValueError("weight must be above 0")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        module = self.grader.partition(":")[0]
        if self.grader not in GRADERS and not importable(module):
            yield (
                f"{where}.grader: there is no module '{module}'. Install it, or add its folder to PYTHONPATH."
            )

    @property
    def judges(self) -> bool:
        return self.grader != "none"

    @property
    def local(self) -> bool:
        return self.path is not None

    @property
    def ends(self) -> bool | None:
        return True

    @property
    def judge(self) -> str | None:
        return self.grader

    @property
    def rollouts(self) -> type[Rollout]:
        return FlowRollout if self.makes == "image" else TokenRollout

    @property
    def routes(self) -> frozenset[str | None] | None:
        """The routes in the files. None for a dataset on the hub, because a check does not download it."""
        if self.path is None:
            return None
        files = [("train", self.path), ("test", self.test), ("validation", self.validation)]
        return frozenset(
            prompt.route
            for split, name in files
            if isinstance(name, str)
            for prompt in self._load(split, name)
        )

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        main = self.path or self.dataset_split
        if split == "test" and self.test is not None:
            return iter(self._load("test", self.test)[start:])
        if split != "train" and isinstance(self.validation, str):
            return iter(self._load("validation", self.validation)[start:])
        prompts = self._load("train", main)
        if not isinstance(self.validation, str):
            wanted = split != "train"
            prompts = [prompt for prompt in prompts if held_out(prompt, self.validation) == wanted]
        if not prompts:
            raise DataError(
                f"task jsonl: no line of {main} is left for the split '{split}' at validation = "
                f"{self.validation}. Choose another share, or set validation to a separate file."
            )
        return endless(prompts, seed, start) if split == "train" else iter(prompts[start:])

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        """The grader's verdict on `made`, a text or an image. ValueError if the prompt has no answer, or with
        the grader "none".
        """
        if self.grader == "none":
            raise ValueError("the task has grader = none, so nothing can be judged")
        if self.grader not in GRADERS:
            return load(self.grader)(prompt, made)
        from reflux.grading.math import final_answer, grade

        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        if self.grader == "math":
            return grade(made, prompt.answer)
        return float(prompt.answer.split() in (made.split(), (final_answer(made) or "").split()))

    def _load(self, source: str, name: str) -> list[Prompt]:
        if self.dataset is None:
            lines, where = read_lines(name, "jsonl"), f"task jsonl: {name}"
        else:
            lines, where = (
                hub_lines(self.dataset, self.dataset_config, name, "jsonl"),
                f"task jsonl: {self.dataset} {name}",
            )
        return make_prompts(lines, where, partial(self._prompt, source))

    def _prompt(self, source: str, number: int, fields: dict[str, Any]) -> Prompt:
        columns = self.keys or {}
        found = {key: fields.get(columns.get(key, key)) for key in KEYS}
        messages = _messages(found["prompt"], found["messages"], columns, fields)
        if self.instruction:
            messages = (
                *messages[:-1],
                {**messages[-1], "content": f"{messages[-1]['content']}\n\n{self.instruction}"},
            )
        return Prompt(
            id=_text(found["id"], "id") or f"{source}/{number}",
            messages=messages,
            answer=_text(found["answer"], "answer"),
            references=_references(found["references"]),
            route=_text(found["route"], "route") or self.route,
        )


def _messages(
    prompt: Any, messages: Any, columns: Mapping[str, str], fields: Mapping[str, Any]
) -> tuple[Message, ...]:
    names = [columns.get(key, key) for key in ("prompt", "messages")]
    if prompt is not None and messages is not None:
        raise ValueError(f"has both '{names[0]}' and '{names[1]}', and only one is allowed")
    if prompt is None and messages is None:
        raise ValueError(
            f"has no field '{names[0]}' or '{names[1]}' (it has {', '.join(map(repr, fields)) or 'none'})"
        )
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"needs a non-empty string in the field '{names[0]}', got {prompt!r}")
        return ({"role": "user", "content": prompt},)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(_is_message(message) for message in messages)
    ):
        raise ValueError(f'has no list of {{"role": text, "content": text}} in its field \'{names[1]}\'')
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "ends with an assistant turn, which the student must write. Move it to 'references' or 'answer'"
        )
    return tuple(
        {"content": None} | {key: message[key] for key in _OF_MESSAGES if key in message}
        for message in messages
    )


def _is_message(message: Any) -> bool:
    """True for a message with a role and a text. An assistant message that calls tools may have no text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    calls = (
        message["role"] == "assistant"
        and isinstance(message.get("tool_calls"), list)
        and message["tool_calls"]
    )
    return isinstance(message.get("content"), str) or bool(calls and message.get("content") is None)


def _references(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"has no list of texts in its field 'references', but {value!r}")
    return tuple(value)


def _text(value: Any, key: str) -> str | None:
    """The text, or a number as text. None if the line has no such value."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"has neither text nor a number in its field '{key}', but {value!r}")
    return str(value)
