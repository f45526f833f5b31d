"""GSM8K, grade-school mathematics: 7,473 training problems and 1,319 test problems (Cobbe et al.,
arXiv:2110.14168).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.errors import DataError
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.data_file import read_file
from reflux.tasks.lines import endless, held_out, hub_lines, make_prompts
from reflux.types import Prompt, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

DATASET, CONFIG = "openai/gsm8k", "main"

GSM8K = Paper(
    "gsm8k", "Training Verifiers to Solve Math Word Problems", "2110.14168", 2021, "Cobbe, Karl and others"
)


@dataclass(frozen=True, config=STRICT)
class Gsm8k(TaskPart):
    """One user message per problem: the question, a blank line, and the `instruction`.

    The answer is the text after "####" in the solution. The whole solution is a reference. path: a folder
    with train.jsonl and test.jsonl of {"question", "answer"}. Without it, the hub dataset openai/gsm8k is
    used. validation: the share of the training problems that is held out for validation, chosen by a hash of
    the id. Ids are "gsm8k/train/17" (line or row, from 1). route: selects the teacher if several have the
    same alias. Answers are graded by `reflux.grading.math`.

    "train" never ends: a new order in each epoch. DataError, with file and line, for data that cannot be
    used.
    """

    path: str | None = None
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    validation: float = 0.05
    route: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(
                "validation is the share of the training problems that is held out, so 0 <= validation < 1"
            )
        if not self.weight > 0:
            raise ValueError("weight must be above 0")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (GSM8K,)

    @property
    def local(self) -> bool:
        return self.path is not None

    @property
    def ends(self) -> bool | None:
        return True

    @property
    def judge(self) -> str | None:
        return "math"

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None]:
        return frozenset([self.route])

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        if split == "test":
            return iter(self._load("test")[start:])
        wanted = split == "validation"
        prompts = [prompt for prompt in self._load("train") if held_out(prompt, self.validation) == wanted]
        if not prompts:
            raise DataError(
                f"task gsm8k: no problem is left for the split '{split}' at validation = {self.validation}. "
                "Choose another share."
            )
        return iter(prompts[start:]) if wanted else endless(prompts, seed, start)

    def verify(self, prompt: Prompt, made: Any) -> float:
        """1.0 if the final answer of the text `made` equals the stored one, else 0.0. ValueError for a prompt
        without an answer.
        """
        from reflux.grading.math import grade

        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        return grade(made, prompt.answer)

    def _load(self, name: str) -> list[Prompt]:
        if self.path is None:
            lines, where = hub_lines(DATASET, CONFIG, name, "gsm8k"), f"task gsm8k: {DATASET} {name}"
        else:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                raise DataError(
                    f"task gsm8k: there is no folder {self.path}; nothing was written. It must contain "
                    'train.jsonl and test.jsonl of {"question", "answer"}. Without `path` the dataset comes '
                    f"from the Hugging Face hub."
                )
            lines, where = read_file(folder / f"{name}.jsonl", "gsm8k"), f"task gsm8k: {folder / name}.jsonl"
        return make_prompts(lines, where, partial(self._prompt, name))

    def _prompt(self, name: str, number: int, fields: dict[str, Any]) -> Prompt:
        for key in ("question", "answer"):
            if key not in fields:
                raise ValueError(f"has no field '{key}'")
            if not isinstance(fields[key], str) or not fields[key].strip():
                raise ValueError(f"needs a non-empty string in the field '{key}', got {fields[key]!r}")
        solution, mark, answer = fields["answer"].rpartition("####")
        if not mark or not answer.strip():
            raise ValueError("has no final answer: nothing follows '####' in its field 'answer'")
        question = f"{fields['question']}\n\n{self.instruction}" if self.instruction else fields["question"]
        return Prompt(
            id=f"gsm8k/{name}/{number}",
            messages=({"role": "user", "content": question},),
            answer=answer.strip(),
            references=(f"{solution.strip()}\n#### {answer.strip()}",),
            route=self.route,
        )
