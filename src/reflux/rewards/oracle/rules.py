"""The criteria by which the rule server judges answers to problems of arithmetic, each with its rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reflux.rewards.rubric_forms import Criterion, Rubric
from reflux.tasks.base import Solution
from reflux.tasks.generated import ANSWER

EQUATION = re.compile(r"(?<![0-9])([0-9]+)([+*-])([0-9]+)=([0-9]+)(?![0-9])")
NUMBER = re.compile(r"[0-9]+")
# Criteria of so many points are raised by one where most students fail them.
RAISED = 2


@dataclass(frozen=True)
class Rule:
    category: str
    text: str
    points: int
    # (the question, its solution, an answer) -> the verdict
    met: Callable[[str, Solution, str], bool]


def final(question: str, solution: Solution, answer: str) -> bool:
    """The number after the last "Answer:" is the solution's."""
    found = ANSWER.match(answer.rpartition("Answer:")[2]) if "Answer:" in answer else None
    return found is not None and found[1] == solution.answer


def plain(question: str, solution: Solution, answer: str) -> bool:
    """There is one "Answer:", and a whole number is all that follows it."""
    tail = answer.partition("Answer:")[2]
    return answer.count("Answer:") == 1 and re.fullmatch(r"\s*-?[0-9]+\.?\s*", tail) is not None


def equations(answer: str) -> list[tuple[int, str, int, int]]:
    """(left, sign, right, result) of every equation that is written in an answer."""
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(answer)]


def true_equations(question: str, solution: Solution, answer: str) -> bool:
    written = equations(answer)
    return bool(written) and all(_result(a, sign, b) == c for a, sign, b, c in written)


def only_given(question: str, solution: Solution, answer: str) -> bool:
    """Every equation starts from numbers of the question or from results of equations before it."""
    known = {int(number) for number in NUMBER.findall(question)}
    for left, _, right, result in equations(answer):
        if not {left, right} <= known:
            return False
        known.add(result)
    return bool(equations(answer))


def every_operation(question: str, solution: Solution, answer: str) -> bool:
    written = Counter((sign, right) for _, sign, right, _ in equations(answer))
    return not Counter(solution.steps) - written


def _result(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


RULES = (
    Rule("correctness", "The number that the answer gives as its final result is right.", 5, final),
    Rule("format", "The final result is stated once, as a plain whole number after 'Answer:'.", 1, plain),
    Rule("accuracy", "At least one equation is written, and every one is true.", 2, true_equations),
    Rule("grounding", "Equations use only numbers of the question and results before them.", 2, only_given),
    Rule("completeness", "Every operation that the question needs is carried out.", 3, every_operation),
)
BY_TEXT = {rule.text: rule for rule in RULES}


def rubric_for(question: str, solution: Solution, students: Sequence[str]) -> Rubric:
    """The rules as a rubric. One of 2 points has 3 where more than half of the students fail it."""
    return Rubric(
        tuple(
            Criterion(f"c{number}", rule.category, rule.text, _points(rule, question, solution, students))
            for number, rule in enumerate(RULES, start=1)
        )
    )


def _points(rule: Rule, question: str, solution: Solution, students: Sequence[str]) -> int:
    failed = sum(not rule.met(question, solution, answer) for answer in students)
    return rule.points + (rule.points == RAISED and 2 * failed > len(students))


def verdict(criterion: str, question: str, solution: Solution, answer: str) -> bool:
    """What the rule of a criterion says; False for a criterion that is no rule's."""
    rule = BY_TEXT.get(criterion)
    return rule is not None and rule.met(question, solution, answer)


def share_met(question: str, solution: Solution, answer: str) -> float:
    """The share of the points of all rules that an answer meets."""
    met = sum(rule.points for rule in RULES if rule.met(question, solution, answer))
    return met / sum(rule.points for rule in RULES)
