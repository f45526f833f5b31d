"""The teacher is told what the student must find out: the stored answer, or a worked solution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import ContextPart, TeacherPrompt, retold
from reflux.contexts.wording import ANSWER, SUCCESS, with_answer
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

OPSD = Paper(
    "opsd",
    "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
    "2601.18734",
    2026,
    "Zhao, Siyan and Xie, Zhihui and Liu, Mengchen and Huang, Jing and Pang, Guan and others",
)
SDFT = Paper(
    "sdft",
    "Self-Distillation Enables Continual Learning",
    "2601.19897",
    2026,
    'Shenfeld, Idan and Damani, Mehul and H{\\"u}botter, Jonas and Agrawal, Pulkit',
)


@dataclass(frozen=True, config=STRICT)
class Privileged(ContextPart):
    """The last user message goes on with `Prompt.answer` (show = "answer") or with the first of
    `Prompt.references` (show = "demonstration"), and a line that asks for a solution of the original
    question; all other messages stay. The student never sees it.

    A prompt that has none, or an empty one, is not asked about: it is counted in the metric `silent` of the
    teacher's name and teaches nothing. A teacher that copies what it is shown only scores the student's own
    words against it. A demonstration is headed as a correct solution of another attempt is under `peers`.
    Papers: arXiv 2601.18734 (OPSD), 2601.19897 (SDFT, demonstrations); both have the student itself as
    teacher (`self`), and any other may be told as well.
    """

    show: Literal["answer", "demonstration"] = "answer"

    min_group: ClassVar[int] = 1

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (OPSD, SDFT) if self.show == "demonstration" else (OPSD,)

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        return [self._view(attempt.rollout.prompt) for attempt in group]

    def _view(self, prompt: Prompt) -> TeacherPrompt | None:
        if self.show == "answer":
            heading, text = ANSWER, prompt.answer
        else:
            heading, text = SUCCESS, prompt.references[0] if prompt.references else None
        if not text:
            return None
        known = text
        return TeacherPrompt(retold(prompt.messages, lambda problem: with_answer(problem, heading, known)))
