"""The teacher sees the reference answer or a worked solution, which the student does not see."""

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
    """The last user message is extended by `Prompt.answer` (show = "answer") or by the first of
    `Prompt.references` (show = "demonstration"), and by a line that asks for a solution of the original
    question. All other messages stay unchanged. The student never sees the addition.

    A prompt without that text, or with an empty text, is not scored. Such a prompt has no target and counts
    in the metric `without_target` of the teacher's name. The teacher only scores the student's own tokens, so
    it cannot copy the shown text into the response. A demonstration gets the same heading as a correct
    attempt under `peers`. Papers: arXiv 2601.18734 (OPSD), 2601.19897 (SDFT, demonstrations). Both use the
    student itself as teacher (`self`); this context also works with any other teacher.
    """

    # Which text of the prompt the teacher sees.
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
