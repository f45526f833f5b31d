"""The small text models: their shapes, tasks and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reflux.assets.lessons import ShownProblem
from reflux.assets.wrong_signs import WrongSigns
from reflux.tasks.arithmetic import ArithmeticTask
from reflux.tasks.base import Task
from reflux.tasks.chains import Chains
from reflux.tasks.mix import Mix
from reflux.tasks.word_problems import WordProblems


@dataclass(frozen=True)
class ModelSpec:
    """A model and the settings of its training."""

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
    # the shipped model whose weights training starts from; "" for an untrained model
    start: str = ""

    @property
    def asked(self) -> str:
        """The tasks of the model, for its card."""
        raise NotImplementedError


@dataclass(frozen=True)
class Spec(ModelSpec):
    """A model that answers in one turn. Specialists differ by `task`, e.g.
    WordProblems(operations=("mul",)).
    """

    # the training task
    task: Task = WordProblems()
    # the training task of the first `easier_steps` of the steps; None if there is no other
    easier: Task | None = None
    easier_steps: int = 0
    # the test task
    exam: ArithmeticTask = WordProblems()
    # further test tasks, with their titles in the report
    also: tuple[tuple[str, Task], ...] = ()

    @property
    def asked(self) -> str:
        return f"the toy task `{self.exam.kind}`"


SMALL = WordProblems(largest=30)


FAR = WordProblems(largest=999)
PRODUCTS = WordProblems(operations=("mul",), largest=70)
# To find a quantity among few is learnt first. Two digits of a given value are harder to copy than one.
FEW = Chains(min_steps=1, max_steps=4, largest_given=30)
ANY = Chains(min_steps=1, largest_given=30)


# All numbers of attempts that a context with at most two successes and one failure can have. Names with a
# trailing underscore use numbers that are too large to compute with after so few training steps, so only
# reading the shown attempts helps. They train the model to copy. Without a shown success, only small numbers
# are trained.
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


# The teachers are trained on larger numbers than they are tested on. The student solves problems with small
# numbers and fails above them. The reader is like the student, but with shown attempts it also solves larger
# ones. The novice is like the student and can also multiply small numbers. The teacher of long answers
# starts from the reader, which can copy and calculate. Its student is the same model, trained further to
# confuse the signs of large numbers when it plans.
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
    "chain_teacher": Spec(
        "chain_teacher",
        layers=2,
        steps=1500,
        seed=22,
        start="reader",
        easier=FEW,
        easier_steps=700,
        task=ANY,
        exam=Chains(),
    ),
    "chain_student": Spec(
        "chain_student",
        layers=2,
        steps=100,
        seed=21,
        batch=48,
        lr=1e-3,
        warmup=10,
        start="chain_teacher",
        task=WrongSigns(),
        exam=Chains(),
    ),
}
