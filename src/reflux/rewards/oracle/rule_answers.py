"""The contents that the rule server answers with: solutions, rubrics, verdicts, scores and preferences.

Its role is the name of the schema in `response_format`, or else the schema version that the prompt names. The
texts that it judges are read back out of the prompt. The same request always gets the same content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reflux.config.step_context import seed_of
from reflux.rewards.judge_forms import MOST_SCORE, PREFERENCE_FORM, SCORE_FORM
from reflux.rewards.marked import read_marked
from reflux.rewards.oracle import rules
from reflux.rewards.oracle.faults import Faults
from reflux.rewards.rubric_forms import RUBRIC_FORM, VERDICTS_FORM, parse_rubric
from reflux.tasks.base import Solution, TaskPart

Role = Literal["answer", "rubric", "verdicts", "score", "preference"]
FORMS: dict[str, Role] = {
    RUBRIC_FORM: "rubric",
    VERDICTS_FORM: "verdicts",
    SCORE_FORM: "score",
    PREFERENCE_FORM: "preference",
}
# The answers to one question differ in their first words.
OPENINGS = ("", "Let us see. ", "Step by step: ", "In order: ")
LAST = re.compile(r"[0-9]+(?=[^0-9]*$)")


class Unanswerable(ValueError):
    """A request that the rule server cannot answer. The text says why."""


@dataclass(frozen=True)
class Oracle:
    """task: solves the problems."""

    task: TaskPart
    faults: Faults = Faults()

    def content(self, body: Mapping[str, Any]) -> str:
        """The content of the answer to a request. Unanswerable if its problem is none of the task's."""
        messages = body["messages"]
        role = role_of(body)
        if role == "answer":
            return self._answer(str(messages[-1]["content"]), int(body.get("seed") or 0))
        prompt = "\n\n".join(str(message["content"]) for message in messages if message["role"] == "user")
        entries = read_marked(prompt)
        texts = {entry.label: entry.text for entry in entries}
        question = texts.get("Question", "")
        solution = self._solved(question)
        answers = [text for label, text in texts.items() if label.startswith("Answer ")]
        key = json.dumps(texts, sort_keys=True)
        if role == "rubric":
            students = [text for label, text in texts.items() if label.startswith("Student ")]
            content = rules.rubric_for(question, solution, students).text
        elif role == "verdicts":
            content = self._verdicts(texts.get("Rubric", ""), question, solution, answers, key)
        elif role == "score":
            content = self._score(question, solution, answers)
        else:
            content = self._preference(question, solution, answers)
        return self._spoilt(content, key)

    def _solved(self, question: str) -> Solution:
        solution = self.task.solve(question)
        if solution is None:
            raise Unanswerable(f"this text is no problem that can be solved by rule: {question[:80]!r}")
        return solution

    def _answer(self, question: str, seed: int) -> str:
        """A worked solution. To some questions, one of four is wrong."""
        worked = self._solved(question).worked
        if self.faults.strikes(self.faults.wrong_references, "wrong_references", question):
            unlucky = seed_of("unlucky", self.faults.seed, question) % len(OPENINGS)
            if seed % len(OPENINGS) == unlucky:
                worked = LAST.sub(lambda last: str(int(last[0]) + 1), worked)
        return OPENINGS[seed % len(OPENINGS)] + worked

    def _verdicts(
        self, rubric_text: str, question: str, solution: Solution, answers: Sequence[str], key: str
    ) -> str:
        rubric, rows = parse_rubric(rubric_text), []
        for index, answer in enumerate(answers, start=1):
            judgement = [
                rules.verdict(criterion.text, question, solution, answer)
                ^ self.faults.strikes(
                    self.faults.wrong_verdicts, "wrong_verdicts", question, answer, criterion.id
                )
                for criterion in rubric.criteria
            ]
            score = sum(points for points, met in zip(rubric.points, judgement, strict=True) if met)
            if self.faults.strikes(self.faults.lying_score, "lying_score", key):
                score = rubric.maximum - score + 1
            rows.append({"answer_index": index, "judgement": judgement, "final_score": score})
        if self.faults.strikes(self.faults.missing_answer, "missing_answer", key):
            rows.pop()
        if self.faults.strikes(self.faults.swapped, "swapped", key):
            rows.reverse()
        return json.dumps({"schema_version": VERDICTS_FORM, "answers": rows})

    def _score(self, question: str, solution: Solution, answers: Sequence[str]) -> str:
        share = rules.share_met(question, solution, answers[0])
        return json.dumps({"schema_version": SCORE_FORM, "reason": "", "score": round(MOST_SCORE * share)})

    def _preference(self, question: str, solution: Solution, answers: Sequence[str]) -> str:
        first, second = (rules.share_met(question, solution, answer) for answer in answers[:2])
        better = "equal" if first == second else "first" if first > second else "second"
        return json.dumps({"schema_version": PREFERENCE_FORM, "reason": "", "better": better})

    def _spoilt(self, content: str, key: str) -> str:
        if self.faults.strikes(self.faults.cut_json, "cut_json", key):
            return content[: len(content) // 2]
        if self.faults.strikes(self.faults.fenced, "fenced", key):
            return f"```json\n{content}\n```"
        return content


def role_of(body: Mapping[str, Any]) -> Role:
    form = body.get("response_format") or {}
    named = (form.get("json_schema") or {}).get("name") if isinstance(form, Mapping) else None
    text = "\n".join(str(message["content"]) for message in body["messages"])
    for role in FORMS.values():
        if role == named:
            return role
    # The prompt names its own form last. A rubric in it names another one.
    last = max(FORMS, key=text.rfind)
    return FORMS[last] if last in text else "answer"
