"""Little stories: told right, repeatable from any position, and never held out and trained on at once."""

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.config.registry import make, part
from reflux.tasks import arithmetic
from reflux.tasks.arithmetic import SIGNS, Operation
from reflux.tasks.base import Split
from reflux.tasks.word_problems import WORDS, WordProblems
from reflux.types import Prompt

ALL = WordProblems(operations=("add", "sub", "mul"))
SETTINGS = (
    WordProblems(),
    ALL,
    WordProblems(operations=("mul",), largest=999),
    WordProblems(operations=("sub",), max_steps=5, largest=50),
)
SIZES: dict[Split, int] = {"train": 4000, "validation": 500, "test": 500}
VERBS: dict[str, Operation] = {verb.split("{}")[0]: kind for kind, verbs in WORDS.items() for verb in verbs}


def take(task: WordProblems, split: Split = "train", count=500, seed=0, start=0) -> list[Prompt]:
    return list(islice(task.prompts(split, seed, start), count))


def story(prompt: Prompt) -> str:
    return prompt.messages[0]["content"]


def read(text: str) -> tuple[int, list[tuple[Operation, int]]]:
    """The chain of a story, understood from its words alone."""
    start = re.match(r"\w+ has (\d+) \w+\. ", text)
    assert start
    assert text.endswith(" How many?")
    sentences = re.findall(r"([A-Z][a-z]+ )(\d+)[^.]*\.", text[start.end() :])
    return int(start[1]), [(VERBS[verb], int(number)) for verb, number in sentences]


@pytest.mark.parametrize("task", SETTINGS)
def test_the_solution_and_the_answer_follow_from_the_words_of_the_story(task):
    for prompt in take(task):
        value, steps = read(story(prompt))
        assert task.min_steps <= len(steps) <= task.max_steps
        told = [f"Start: {value}."]
        for kind, number in steps:
            assert kind in task.operations
            assert number >= 1
            before, value = value, {"add": value + number, "sub": value - number, "mul": value * number}[kind]
            assert 0 <= value <= task.largest
            told.append(f"{before}{SIGNS[kind]}{number}={value}.")
        assert prompt.references == (" ".join([*told, f"Answer: {value}"]),)
        assert prompt.answer == str(value)


def test_the_default_is_short():
    prompts = take(WordProblems(), count=3000)
    assert max(len(story(prompt)) for prompt in prompts) <= 60
    assert max(len(prompt.references[0]) for prompt in prompts) <= 52


@pytest.mark.parametrize("split", SIZES)
def test_any_position_can_be_started_from(split: Split):
    whole = take(ALL, split, 60, seed=3)
    assert take(ALL, split, 60 - 17, seed=3, start=17) == whole[17:]
    assert take(ALL, split, 60, seed=4) != whole


def test_a_far_position_makes_no_problem_before_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        WordProblems, "draw_prompt", lambda self, split, seed, position: made.append(position)
    )
    take(WordProblems(), count=2, start=10**12)
    assert made == [10**12, 10**12 + 1]


def test_held_out_splits_end_and_training_does_not():
    task = WordProblems(held_out=7)
    assert len(list(task.prompts("test", 0))) == len(list(task.prompts("validation", 0))) == 7
    assert list(task.prompts("test", 0, start=7)) == []
    assert len(take(task, count=5000)) == 5000


@pytest.mark.parametrize(
    "task", [WordProblems(largest=9, min_steps=1, max_steps=2), WordProblems(operations=("mul",), largest=99)]
)
def test_no_chain_is_in_two_splits_for_any_seed(task):
    """A world small enough for thousands of draws to cover it: the same numbers in another dress would be
    found.
    """
    chains = {
        split: {str(read(story(prompt))) for seed in (0, 1) for prompt in take(task, split, count, seed)}
        for split, count in SIZES.items()
    }
    assert all(len(found) > 10 for found in chains.values())
    assert not chains["train"] & chains["validation"]
    assert not chains["train"] & chains["test"]
    assert not chains["validation"] & chains["test"]
    repeated = [str(read(story(prompt))) for prompt in take(task)]
    assert len(set(repeated)) < len(repeated)


def test_held_out_problems_are_about_a_tenth_each(monkeypatch):
    monkeypatch.setattr(arithmetic, "split_of", lambda chain: "train")
    drawn = [read(story(prompt)) for prompt in take(WordProblems(), count=4000)]
    monkeypatch.undo()
    splits = [arithmetic.split_of((start, tuple(steps))) for start, steps in drawn]
    for split in ("validation", "test"):
        assert 0.08 < splits.count(split) / len(splits) < 0.12


def test_longer_stories_are_held_out_only():
    task = WordProblems(longer=2)
    assert {len(read(story(prompt))[1]) for prompt in take(task, "test")} == {5}
    assert {len(read(story(prompt))[1]) for prompt in take(task, "validation")} == {5}
    assert take(task) == take(WordProblems())


def test_ids_are_unique_in_a_stream_and_name_the_problem():
    prompts = take(WordProblems(largest=9), count=2000)
    assert len({prompt.id for prompt in prompts}) == 2000
    assert take(WordProblems(largest=9), count=2000, seed=1)[0].id != prompts[0].id


def test_the_route_is_the_family_of_most_steps():
    for prompt in take(ALL):
        kinds = [kind for kind, _ in read(story(prompt))[1]]
        assert prompt.route == ("mul" if kinds.count("mul") >= len(kinds) / 2 else "add")
    assert {prompt.route for prompt in take(ALL)} == {"add", "mul"}
    assert {prompt.route for prompt in take(WordProblems())} == {"add"}


@pytest.mark.parametrize(
    ("made", "right"),
    [
        ("Start: 12. 12+7=19. Answer: 19", 1.0),
        ("Answer:19", 1.0),
        ("Answer: 19.", 1.0),
        ("Answer: 3. No. Answer: 19", 1.0),
        ("Answer: 19 Answer: 3", 0.0),
        ("Answer: 190", 0.0),
        ("Answer: 19.5", 0.0),
        ("Answer: 19,000", 0.0),
        ("Answer: -19", 0.0),
        ("Answer: 1 9", 0.0),
        ("Answer: x19", 0.0),
        ("Answer:", 0.0),
        ("Answer: " + "9" * 10_000, 0.0),
        ("Answer: ١٩", 0.0),
        ("19", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_only_the_number_after_the_last_answer_counts(made, right):
    assert WordProblems().verify(Prompt("p", (), answer="19"), made) == right


@given(st.text())
def test_verify_survives_any_text(text):
    prompt = Prompt("p", (), answer="19")
    assert WordProblems().verify(prompt, text) == 0.0 or "19" in text
    assert WordProblems().verify(prompt, text + "Answer: 19") == 1.0


def test_a_worked_solution_is_right_and_no_answer_is_an_error():
    for prompt in take(ALL, "test"):
        assert ALL.verify(prompt, prompt.references[0]) == 1.0
        assert ALL.verify(prompt, prompt.references[0] + "7") == 0.0
    with pytest.raises(ValueError, match="no answer"):
        ALL.verify(Prompt("p", ()), "Answer: 1")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"operations": ()}, "at least one"),
        ({"operations": ("add", "add")}, "each once"),
        ({"min_steps": 4}, "min_steps <= max_steps"),
        ({"longer": -1}, "must not be negative"),
        ({"weight": 0.0}, "greater than 0"),
        ({"operations": ("mul",), "max_steps": 6}, "Raise largest"),
        ({"operations": ("add",), "largest": 4}, "Raise largest"),
        ({"operations": ("sub",), "largest": 2}, "Raise largest"),
    ],
)
def test_settings_without_a_story_are_refused_in_words(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        WordProblems(**setting)


def test_too_few_stories_to_hold_some_out_is_said():
    # one story: 2, doubled, doubled
    task = WordProblems(operations=("mul",), min_steps=2, max_steps=2, largest=8)
    with pytest.raises(ValueError, match="too few different problems"):
        [take(task, split, 1) for split in SIZES]


def test_it_is_a_registered_part():
    assert part("tasks", "word_problems") is WordProblems
    assert make(WordProblems, {"operations": ["mul"], "largest": 999}, "task") == WordProblems(
        operations=("mul",), largest=999
    )
