"""The small text models: their shapes, their problems and their seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reflux.assets.lessons import ShownProblem
from reflux.tasks.base import Task
from reflux.tasks.mix import Mix
from reflux.tasks.word_problems import WordProblems


@dataclass(frozen=True)
class Spec:
    """A model and how it is trained. Specialists differ by `task`, e.g. WordProblems(operations=("mul",))."""

    name: str
    layers: int
    steps: int
    seed: int
    width: int = 96
    inner: int = 256
    heads: int = 3
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 50
    # the shipped model whose weights it begins with; "" for fresh ones
    start: str = ""
    # what it is trained on
    task: Task = WordProblems()
    # what it is measured by
    exam: WordProblems = WordProblems()
    # and by these besides, under these titles
    also: tuple[tuple[str, Task], ...] = ()


SMALL = WordProblems(largest=30)


FAR = WordProblems(largest=999)
PRODUCTS = WordProblems(operations=("mul",), largest=70)


# Every number of attempts that "two successes and one failure" can come to. A trailing underscore: with
# numbers that nobody can reckon with after so few steps, so that only reading helps; they teach to copy.
# Where no success is shown, only small numbers are learnt.
READING = Mix(
    parts={
        "plain": replace(SMALL, weight=0.25),
        "wrong": ShownProblem(SMALL, 0, 1, weight=0.15),
        "one": ShownProblem(WordProblems(), 1, 0, weight=0.08),
        "two": ShownProblem(WordProblems(), 2, 0, weight=0.05),
        "one_wrong": ShownProblem(WordProblems(), 1, 1, weight=0.06),
        "two_wrong": ShownProblem(WordProblems(), 2, 1, weight=0.06),
        "one_": ShownProblem(FAR, 1, 0, weight=0.12),
        "two_": ShownProblem(FAR, 2, 0, weight=0.06),
        "one_wrong_": ShownProblem(FAR, 1, 1, weight=0.08),
        "two_wrong_": ShownProblem(FAR, 2, 1, weight=0.09),
    }
)


SHOWN = {
    "a correct attempt": ShownProblem(WordProblems(), 1, 0),
    "two correct attempts": ShownProblem(WordProblems(), 2, 0),
    "two correct attempts and a wrong one": ShownProblem(WordProblems(), 2, 1),
    "a wrong attempt": ShownProblem(WordProblems(), 0, 1),
    "two correct attempts and a wrong one at another problem": ShownProblem(
        WordProblems(), 2, 1, foreign=True
    ),
}


# The teachers know more than they are asked; the student is good at small numbers and lost above them. So is
# the reader, unless shown how, and the novice, who can multiply small numbers besides.
SPECS = {
    "teacher": Spec("teacher", layers=3, steps=1500, seed=1, batch=96, task=WordProblems(largest=99)),
    "student": Spec("student", layers=2, steps=600, seed=12, lr=2e-3, task=SMALL),
    "mul_teacher": Spec(
        "mul_teacher",
        layers=3,
        steps=1000,
        seed=3,
        batch=96,
        task=WordProblems(operations=("mul",), largest=300),
        exam=WordProblems(operations=("mul",), largest=99),
        also=(
            ("held-out problems with numbers up to 200", WordProblems(operations=("mul",), largest=200)),
            (
                "held-out problems of the other teacher (operations = ('add', 'sub'), largest = 50)",
                WordProblems(),
            ),
        ),
    ),
    "novice": Spec(
        "novice",
        layers=2,
        steps=300,
        seed=5,
        lr=2e-3,
        warmup=30,
        start="student",
        task=Mix(parts={"add": SMALL, "mul": PRODUCTS}),
        also=(
            (
                "held-out multiplications (operations = ('mul',), largest = 99)",
                WordProblems(operations=("mul",), largest=99),
            ),
            ("held-out multiplications of the kind it was trained on (largest = 70)", PRODUCTS),
            ("held-out problems without multiplication of the kind it was trained on (largest = 30)", SMALL),
        ),
    ),
    "reader": Spec(
        "reader",
        layers=2,
        steps=450,
        seed=4,
        batch=48,
        lr=2e-3,
        warmup=30,
        start="student",
        task=READING,
        also=tuple((f"held-out problems, {title} shown", task) for title, task in SHOWN.items()),
    ),
}
