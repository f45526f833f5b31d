"""Prompts of a user, from a local file or a dataset of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from reflux.config.importable import importable, lacks
from reflux.config.json_rows import Line
from reflux.config.line_fields import messages_of, references_of, text_of, value_of
from reflux.config.registry import STRICT, did_you_mean, load
from reflux.errors import DataError
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.data_file import read_file
from reflux.tasks.lines import check_columns, endless, held_out, hub_lines, make_prompts
from reflux.types import FlowRollout, Prompt, Reward, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

KEYS = ("prompt", "messages", "answer", "references", "route", "id")
# the graders that compare with the stored answer
COMPARES = ("math", "exact")
GRADERS = (*COMPARES, "none")


@dataclass(frozen=True, config=STRICT)
class Jsonl(TaskPart):
    """Prompts from lines of {"prompt" or "messages", "answer", "references", "route", "id"}.

    Each line needs "prompt" or "messages"; the other keys are optional. prompt: one user message, or a list
    of messages. messages: a chat, [{"role", "content"}, ...], that ends before the turn of the student. If
    tools were called, messages have "tool_calls" (the content may then be null), "tool_call_id" and "name".
    answer: text or a number. references: worked answers, for the `references` sampler: a text, a list of
    texts, or a list of one assistant message. route: selects the teacher (default: the field `route` of this
    task). id: stable and unique (default: "train/17", the number of the line).

    path: the file. Its ending gives the format: `.parquet`, `.csv`, `.tsv`, `.json` (one array of objects),
    and JSON lines for all others. A further ending `.gz`, `.bz2`, `.zst` or `.lz4` is decompressed. dataset
    (with dataset_config and dataset_split): a dataset on the hub, instead of path. keys: the names of these
    columns in the file if they differ, e.g. {prompt = "question", answer = "reward_model.ground_truth"}; a
    dot leads into a nested column. A column of `keys` in which no line has a value is refused. Other columns
    are ignored.

    validation: a share of the lines, held out by a hash of their id; or the name of a file (on the hub: of a
    split) that is the validation set. test: the file (on the hub: the split) of test lines. Without it,
    "test" is the validation set. instruction: appended to the last message after a blank line. grader: "math"
    (see `reflux.grading.math`), "exact" (equal text or final answer, ignoring differences of white space),
    "none", or "my_module:function". This function is called with (prompt, text or image of the student) and
    returns a number from 0 to 1, or a Reward. makes: "text", or "image" for flow models. An image needs a
    grader of the user, which gets uint8 [height, width(, 3)].

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
        if self.makes == "image" and self.grader in COMPARES:
            raise ValueError(
                f'grader "{self.grader}" judges texts. For images use "my_module:function", or "none"'
            )
        if not self.weight > 0:
            raise ValueError("weight must be above 0")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        module, _, function = self.grader.partition(":")
        if self.grader not in GRADERS and not importable(module):
            yield (
                f"{where}.grader: there is no module '{module}'. Install it, or add its folder to PYTHONPATH."
            )
        elif self.grader not in GRADERS and lacks(module, function):
            yield f"{where}.grader: the module '{module}' has no function '{function}'."

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.path is None or not Path(self.path).expanduser().exists():
            # A file that is missing is refused where it is read.
            return
        compares = self.grader in COMPARES and any(
            part.verifies for part in (*cfg.evals.values(), *cfg.rewards.values())
        )
        trained: set[str] = set()
        for split, name in self._files():
            lines, place = self._lines(name)
            prompts = self._made(split, lines, place)
            if any(fields.get("tools") for _, fields in lines):
                yield (
                    f"{where}: the column 'tools' of {name} is not read, so the prompts do not show these "
                    "tools. Give the tools that all prompts have in the tables of student and teachers, as "
                    "template = {tools = [...]}."
                )
            without = [prompt.id for prompt in prompts if prompt.answer is None]
            if compares and 0 < len(without) < len(prompts):
                yield (
                    f"{where}: {len(without)} of the {len(prompts)} prompts in {name} have no answer (the "
                    f"first is {without[0]}). Attempts at them get no verdict."
                )
            asked = [repr(prompt.messages) for prompt in prompts]
            if split == "train":
                trained = set(asked)
            elif known := sum(question in trained for question in asked):
                yield (
                    f"{where}: {known} of the {len(asked)} prompts in {name} are also in {self.path}, which "
                    f"trains the student. Results on them do not show how it does on new prompts."
                )

    @property
    def judges(self) -> bool:
        return self.grader != "none"

    @property
    def paths(self) -> tuple[str, ...]:
        return ("dataset",) if self.path is None else ("path", "validation", "test")

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
        return frozenset(prompt.route for split, name in self._files() for prompt in self._load(split, name))

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
        from reflux.grading.math import exact, grade

        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        if self.grader == "math":
            return grade(made, prompt.answer)
        return exact(made, prompt.answer)

    def _files(self) -> list[tuple[str, str]]:
        """(split, name of the file) of every file."""
        named = (("train", self.path), ("test", self.test), ("validation", self.validation))
        return [(split, name) for split, name in named if isinstance(name, str)]

    def _load(self, source: str, name: str) -> list[Prompt]:
        return self._made(source, *self._lines(name))

    def _lines(self, name: str) -> tuple[list[Line], str]:
        """The rows of a file or split, and where they are, for errors."""
        if self.dataset is None:
            return read_file(name, "jsonl"), f"task jsonl: {name}"
        lines = hub_lines(self.dataset, self.dataset_config, name, "jsonl")
        return lines, f"task jsonl: {self.dataset} {name}"

    def _made(self, source: str, lines: list[Line], where: str) -> list[Prompt]:
        columns = self.keys or {}
        if source != "train":
            # Held-out prompts need neither references nor a route of their own.
            columns = {key: name for key, name in columns.items() if key not in ("references", "route")}
        check_columns(lines, columns, where)
        return make_prompts(lines, where, partial(self._prompt, source))

    def _prompt(self, source: str, number: int, fields: dict[str, Any]) -> Prompt:
        name = {key: key for key in KEYS} | (self.keys or {})
        found = {key: value_of(fields, name[key]) for key in KEYS}
        asked = (name["prompt"], name["messages"])
        if found["prompt"] is None and found["messages"] is None:
            raise ValueError(
                f"has no field '{asked[0]}' or '{asked[1]}' (it has {', '.join(map(repr, fields)) or 'none'})"
            )
        # Both keys may name the same column.
        chat = found["messages"] if asked[0] != asked[1] else None
        messages = messages_of(found["prompt"], chat, asked)
        if self.instruction:
            messages = (
                *messages[:-1],
                {**messages[-1], "content": f"{messages[-1]['content']}\n\n{self.instruction}"},
            )
        return Prompt(
            id=text_of(found["id"], name["id"]) or f"{source}/{number}",
            messages=messages,
            answer=text_of(found["answer"], name["answer"]),
            references=references_of(found["references"], name["references"]),
            route=text_of(found["route"], name["route"]) or self.route,
        )
