"""What the reader of shown attempts is taught: right ones are right, wrong ones are wrong, and all stand as a
context would put them.
"""

import random
import re
from dataclasses import replace
from itertools import islice

import pytest

from reflux.assets.characters import character_tokenizer
from reflux.assets.lessons import ShownProblem, failed, read, slip
from reflux.assets.make import encode
from reflux.assets.specs import READING, SPECS
from reflux.assets.wrong_signs import WrongSigns
from reflux.contexts.wording import with_attempts
from reflux.tasks.chains import Chains
from reflux.tasks.word_problems import WordProblems

STORIES = {
    "add_sub": WordProblems(),
    "all": WordProblems(operations=("add", "sub", "mul"), largest=99),
    "longer": WordProblems(longer=2),
}


@pytest.mark.parametrize("name", list(STORIES))
def test_a_wrong_attempt_is_a_worked_solution_with_one_mistake_that_is_carried_on(name):
    """Every attempt that states an answer: its story is that of the solution but for one number, and all
    after it follows.
    """
    seen = {"stated": 0, "early": 0, "late": 0}
    for prompt in islice(STORIES[name].prompts("test", 0), 300):
        solution = prompt.references[0]
        made = failed(solution, random.Random(prompt.id))
        assert STORIES[name].verify(prompt, made) == 0
        assert "=-" not in made
        assert not re.search(rf"Answer: ?{prompt.answer}(?![0-9])", made)
        stated = re.fullmatch(r"Start: [0-9]+\.( [0-9]+[-+*][0-9]+=[0-9]+\.)+ Answer: ([0-9]+)", made)
        if stated is None:
            continue
        (start, steps), (true_start, true_steps) = read(made), read(solution)
        assert [number for _, number in steps] == [number for _, number in true_steps]
        assert [kind for kind, _ in steps] == [kind for kind, _ in true_steps]
        lefts, results = re.findall(r"([0-9]+)[-+*]", made), re.findall(r"=([0-9]+)", made)
        assert lefts == [str(start), *results[:-1]]
        assert stated[2] == results[-1]
        values = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}
        wrong = [
            values[kind](int(left), number) != int(got)
            for left, (kind, number), got in zip(lefts, steps, results, strict=True)
        ]
        assert sum([start != true_start, *wrong]) == 1
        seen["stated"] += 1
        seen["early" if start != true_start or wrong[0] else "late"] += 1
    assert 0.7 * 300 < seen["stated"] < 0.9 * 300
    assert min(seen["early"], seen["late"]) > 60


def test_a_wrong_attempt_may_stop_early_or_end_in_a_scramble_and_its_dice_are_its_own():
    solution = "Start: 12. 12+7=19. 19-5=14. Answer: 14"
    made = [failed(solution, random.Random(seed)) for seed in range(400)]
    assert made == [failed(solution, random.Random(seed)) for seed in range(400)]
    unfinished = [text for text in made if "Answer:" not in text]
    assert 0.1 < len(unfinished) / len(made) < 0.3
    assert all("Answer: 14" not in text for text in made)
    assert any(text.startswith("Start: 12. 12+7=19. 19-5=") and "Answer" in text for text in made)
    assert any(not text.startswith("Start: 12.") for text in made)
    with pytest.raises(ValueError, match="not a worked solution"):
        failed("12+7=19", random.Random(0))


def test_a_slip_is_another_number_and_never_below_none():
    rng = random.Random(0)
    for number in [*range(100), 100, 305]:
        slips = {slip(number, rng) for _ in range(50)}
        assert number not in slips
        assert min(slips) >= 0
        assert len(slips) >= 4


def test_a_solution_is_read_back_as_it_was_told():
    assert read("Start: 12. 12*3=36. 36-5=31. 31+1=32. Answer: 32") == (
        12,
        (("mul", 3), ("sub", 5), ("add", 1)),
    )


@pytest.mark.parametrize(("successes", "failures"), [(1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2)])
@pytest.mark.parametrize("foreign", [False, True])
def test_shown_attempts_stand_in_the_question_as_a_context_would_put_them(successes, failures, foreign):
    task = WordProblems(held_out=20)
    bare = list(task.prompts("test", 3))
    asked = list(ShownProblem(task, successes, failures, foreign=foreign).prompts("test", 3))
    assert len(asked) == len(bare) - foreign
    for prompt, plain, other in zip(asked, bare, bare[foreign:], strict=False):
        text = prompt.messages[0]["content"]
        wrong = re.findall(r"A failed solution; do not repeat its mistake:\n([^\n]*)", text)
        right = re.findall(r"(?:A|Another) correct solution:\n([^\n]*)", text)
        assert right == [other.references[0]] * successes
        assert all(task.verify(other, shown) == 1 for shown in right)
        assert len(wrong) == failures
        assert all(task.verify(other, shown) == 0 for shown in wrong)
        assert text == with_attempts(plain.messages[0]["content"], right, wrong)
        assert replace(prompt, messages=plain.messages) == plain
        assert len(prompt.messages) == 1


def test_what_the_reader_is_taught_fits_its_window_shows_every_number_of_attempts_and_shows_them_right():
    tokenizer = character_tokenizer()
    stream = list(islice(READING.prompts("train", SPECS["reader"].seed), 1000))
    ids_BT, _ = encode(stream, tokenizer)
    assert ids_BT.shape[1] <= tokenizer.model_max_length
    counts = {}
    for prompt in stream:
        text = prompt.messages[0]["content"]
        right = re.findall(r"correct solution:\n([^\n]*)", text)
        wrong = re.findall(r"do not repeat its mistake:\n([^\n]*)", text)
        assert all(READING.verify(prompt, shown) == 1 for shown in right)
        assert all(READING.verify(prompt, shown) == 0 for shown in wrong)
        counts[len(right), len(wrong)] = counts.get((len(right), len(wrong)), 0) + 1
        if not right:
            assert max(int(number) for number in re.findall("[0-9]+", text.partition("\n")[0])) <= 30
    assert set(counts) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}
    assert min(counts.values()) >= 100


PLAN = re.compile(r"([A-Z])([a-z])([1-9])([-+])\.")


def test_wrong_signs_are_planned_and_computed_and_the_answer_stays_right():
    task, exam = WrongSigns(), Chains()
    prompts = list(islice(task.prompts("train", 0), 200))
    changed = 0
    for prompt in prompts:
        told = {name: (start, int(number), sign) for name, start, number, sign in PLAN.findall(facts(prompt))}
        plan, computed = prompt.references[0].split(" So ")
        value = None
        for name, start, number, sign in reversed(PLAN.findall(plan)):
            assert told[name][:2] == (start, int(number))
            assert (sign != told[name][2]) == (int(number) >= 6)
            value = int(plan.split(". ")[-1][1:-1]) if value is None else value
            after = value + int(number) * (1 if sign == "+" else -1)
            assert f"{name}{start}{number}{sign}={value}{sign}{number}={after}." in computed
            assert 0 <= after <= task.largest
            value = after
        assert computed.endswith(f"Answer: {value}")
        # the right answer follows from the problem alone
        assert exam.verify(prompt, right(prompt, told)) == 1.0
        changed += str(value) != prompt.answer
    assert 60 < changed < 190


def facts(prompt):
    return prompt.messages[0]["content"]


def right(prompt, told):
    """The answer that follows from the sentences of a problem."""
    given = {name: int(value) for name, value in re.findall(r"([A-Z])([0-9]+)\.", facts(prompt))}

    def value(name):
        if name in given:
            return given[name]
        start, number, sign = told[name]
        return value(start.upper()) + (number if sign == "+" else -number)

    return f"Answer: {value(facts(prompt)[-2])}"
