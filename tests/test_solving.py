"""The tasks that solve their own problems from the text alone."""

from __future__ import annotations

from itertools import islice

import pytest

from reflux.tasks.arithmetic import ArithmeticTask
from reflux.tasks.chains import Chains
from reflux.tasks.mix import Mix
from reflux.tasks.word_problems import WordProblems

EVERY = ("add", "sub", "mul")
TASKS: dict[str, ArithmeticTask] = {
    "words": WordProblems(operations=EVERY, largest=60),
    "chains": Chains(operations=EVERY, largest=60),
    "longer": WordProblems(longer=2),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_problem_is_solved_as_the_task_solves_it(name: str) -> None:
    task = TASKS[name]
    for split in ("train", "test"):
        for prompt in islice(task.prompts(split, 3), 200):
            solution = task.solve(prompt.messages[0]["content"])
            assert solution is not None
            assert (solution.worked, solution.answer) == (prompt.references[0], prompt.answer)
            signs = [sign for sign, _ in solution.steps]
            # Every step is an equation of the worked solution.
            assert all(f"{sign}{number}=" in solution.worked for sign, number in solution.steps)
            assert len(signs) >= 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "How many?",
        "Tom has 12 apples.",
        "Tom has 12 apples. Buys 7. How much?",
        "Tom has 12 apples. Eats 7. How many?",
        "Tom has apples. Buys 7. How many?",
        "Tim has 12 apples. Buys 7. How many?",
        "A7. Ba5+. C?",
        "A7. Ba5+. B",
        "Ab2+. Ba5+. B?",
        "A7. A8. A?",
        "A7. Ba5/. B?",
    ],
)
def test_another_text_is_not_solved(text: str) -> None:
    assert [task.solve(text) for task in TASKS.values()] == [None] * len(TASKS)


def test_a_mix_solves_what_its_tasks_solve() -> None:
    mix = Mix({"a": WordProblems(), "b": Chains()})
    assert mix.solves
    for prompt in islice(mix.prompts("train", 0), 20):
        solution = mix.solve(prompt.messages[0]["content"])
        assert solution is not None
        assert solution.answer == prompt.answer
