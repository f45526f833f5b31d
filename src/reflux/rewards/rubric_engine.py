"""The opened rubric reward: teacher's answers, one rubric, blind verdicts, scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reflux.clients.chat_messages import ChatRequest, Schema
from reflux.engines.endpoints.teacher_answers import TeacherSampling, teacher_answers
from reflux.grading.thinking import after_thinking
from reflux.models.chat.surrogates import whole_characters
from reflux.rewards.chat_prompts import filled, labelled, prompt_text, question_of
from reflux.rewards.judged_group import GroupJudge
from reflux.rewards.marked import Marked
from reflux.rewards.rubric_forms import (
    FEWEST,
    MOST,
    RUBRIC_SCHEMA,
    VERDICTS_SCHEMA,
    Rubric,
    final_scores,
    parse_rubric,
    parse_verdicts,
    weighted_score,
)
from reflux.runtime.together import together
from reflux.types import Prompt, Reward

if TYPE_CHECKING:
    from reflux.clients.chat import ChatClient
    from reflux.rewards.rubric import RubricReward
    from reflux.runtime.services import Services

Source = Literal["reference", "student"]


@dataclass(frozen=True, slots=True)
class PooledText:
    """A text to be judged, and where it occurs first."""

    source: Source
    index: int
    text: str


def pool(prompt_id: str, references: Sequence[str], students: Sequence[str], blind: bool) -> list[PooledText]:
    """The different texts of both, each once. blind: in an order that their digests decide, which is the
    same in every run; else the references come first.
    """
    written: list[tuple[Source, Sequence[str]]] = [("reference", references), ("student", students)]
    first: dict[str, PooledText] = {}
    for source, texts in written:
        for index, text in enumerate(texts):
            first.setdefault(text, PooledText(source, index, text))
    found = list(first.values())
    return sorted(found, key=lambda one: _digest(prompt_id, one)) if blind else found


def _digest(prompt_id: str, one: PooledText) -> str:
    return hashlib.sha256(json.dumps([prompt_id, one.source, one.index, one.text]).encode()).hexdigest()


class OpenRubric(GroupJudge):
    """The opened reward. `score` may be called for several groups at the same time."""

    role = "rubric"

    def __init__(self, part: RubricReward, judge: ChatClient, teacher: ChatClient | None, services: Services):
        self.services, self._part, self._judge, self._teacher = services, part, judge, teacher
        self._rubric_prompt = prompt_text("rubric", part.rubric_prompt)
        self._verdicts_prompt = prompt_text("verdicts", part.verdicts_prompt)

    async def judged(self, prompt: Prompt, texts: list[str]) -> list[Reward]:
        """The rewards of the texts. Raises ServerError if a call fails."""
        references = [whole_characters(after_thinking(text)) for text in await self._references(prompt)]
        if self._part.rubric_per == "group":
            return await self._by_one_rubric(prompt, references, texts)
        different = list(dict.fromkeys(texts))
        found = await together(self._by_one_rubric(prompt, references, [text]) for text in different)
        by_text = {text: reward for text, (reward,) in zip(different, found, strict=True)}
        return [by_text[text] for text in texts]

    async def _by_one_rubric(self, prompt: Prompt, references: list[str], texts: list[str]) -> list[Reward]:
        question = question_of(prompt.messages)
        rubric = await self._rubric(question, references, texts)
        answers = pool(prompt.id, references, texts, self._part.blind)
        size = self._part.verifier_chunk or len(answers)
        chunks = [answers[start : start + size] for start in range(0, len(answers), size)]
        found = await together(self._verdicts(question, rubric, chunk) for chunk in chunks)
        by_text = {text: row for rows in found for text, row in rows.items()}
        scores = [weighted_score(rubric.points, by_text[text]) for text in references]
        anchor = sum(scores) / len(scores)
        return [_reward(rubric, by_text[text], anchor) for text in texts]

    async def _references(self, prompt: Prompt) -> Sequence[str]:
        part = self._part
        if self._teacher is None:
            return prompt.references[: part.references]
        sampling = TeacherSampling(
            part.references, part.teacher_temperature, part.teacher_max_tokens, part.teacher_timeout_s
        )
        return await teacher_answers(self._teacher, prompt.messages, sampling)

    async def _rubric(self, question: str, references: Sequence[str], students: Sequence[str]) -> Rubric:
        part = self._part
        groups = {
            "question": [Marked("Question", question)],
            "references": labelled("Reference", references),
            "students": labelled("Student", students),
        }
        request = ChatRequest(
            role="rubric",
            messages=_messages(filled(self._rubric_prompt, groups, {"fewest": FEWEST, "most": MOST})),
            max_tokens=part.rubric_max_tokens,
            timeout_s=part.rubric_timeout_s,
            temperature=part.rubric_temperature,
            schema=Schema(name="rubric", schema=RUBRIC_SCHEMA),
        )
        return (await self._judge.parsed(request, parse_rubric, part.rubric_repairs))[0]

    async def _verdicts(
        self, question: str, rubric: Rubric, answers: Sequence[PooledText]
    ) -> Mapping[str, list[bool]]:
        """The verdicts on each of these answers, by its text."""
        part, count, criteria = self._part, len(answers), len(rubric.criteria)
        groups = {
            "question": [Marked("Question", question)],
            "rubric": [Marked("Rubric", rubric.text)],
            "answers": [
                Marked(f"Answer {number}" + ("" if part.blind else f" ({one.source})"), one.text)
                for number, one in enumerate(answers, start=1)
            ],
        }
        prompt = filled(self._verdicts_prompt, groups, {"n_answers": count, "n_criteria": criteria})
        request = ChatRequest(
            role="verdicts",
            messages=_messages(prompt),
            max_tokens=part.verdicts_max_tokens,
            timeout_s=part.verdicts_timeout_s,
            temperature=part.verdicts_temperature,
            schema=Schema(name="verdicts", schema=VERDICTS_SCHEMA),
        )
        rows, answer = await self._judge.parsed(
            request, lambda text: parse_verdicts(text, count, criteria), part.verdicts_repairs
        )
        told = final_scores(answer.text, count, criteria)
        self.services.usage.add("verdicts", {"sums_differ": _differing(rubric, rows, told)})
        return {one.text: row for one, row in zip(answers, rows, strict=True)}


def _differing(rubric: Rubric, rows: Sequence[Sequence[bool]], told: Sequence[Any]) -> int:
    """The number of answers whose `final_score` is not the sum of the points that they have."""
    sums = [sum(p for p, met in zip(rubric.points, row, strict=True) if met) for row in rows]
    return sum(score != own for score, own in zip(told, sums, strict=True))


def _reward(rubric: Rubric, row: Sequence[bool], anchor: float) -> Reward:
    """anchor: the mean score of the teacher's answers."""
    parts = {criterion.id: float(met) for criterion, met in zip(rubric.criteria, row, strict=True)}
    feedback = "\n".join(
        f"{'yes' if met else 'no'} ({criterion.points} points): {criterion.text}"
        for criterion, met in zip(rubric.criteria, row, strict=True)
    )
    return Reward(weighted_score(rubric.points, row), {**parts, "references": anchor}, feedback)


def _messages(prompt: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt},)
