"""Problems with a plan: each is solved here from its words alone, and its worked solution says the same."""

import re
from itertools import islice, pairwise

import pytest

from reflux.assets.characters import character_tokenizer
from reflux.config.registry import part
from reflux.tasks.arithmetic import SIGNS
from reflux.tasks.base import Split
from reflux.tasks.chains import Chains
from reflux.tasks.generated import split_of
from reflux.types import Prompt

ALL = Chains(operations=("add", "sub", "mul"), largest=99)
SETTINGS = (
    Chains(),
    ALL,
    Chains(min_steps=1, max_steps=2, distractors=0),
    Chains(operations=("sub",), min_steps=4, max_steps=8, largest=12),
    # every number that is reached is so large that no further quantity can be a multiple of it
    Chains(operations=("mul",), min_steps=2, max_steps=2, largest=12),
)
GIVEN, DEFINED = re.compile(r"([A-Z])([0-9]+)\."), re.compile(r"([A-Z])([a-z])([1-9])([-+*])\.")
KINDS = {sign: kind for kind, sign in SIGNS.items()}


def take(task: Chains, split: Split = "train", count=300, seed=0) -> list[Prompt]:
    return list(islice(task.prompts(split, seed), count))


def read(prompt: Prompt):
    """(asked, given, defined) of a problem: given is {letter: value}, defined {letter: (number, kind,
    letter)}."""
    *facts, asked = prompt.messages[0]["content"].split(" ")
    given = {found[1]: int(found[2]) for fact in facts if (found := GIVEN.fullmatch(fact))}
    defined = {
        found[1]: (int(found[3]), KINDS[found[4]], found[2].upper())
        for fact in facts
        if (found := DEFINED.fullmatch(fact))
    }
    assert len(given) + len(defined) == len(facts)
    last = re.fullmatch(r"([A-Z])\?", asked)
    assert last
    return last[1], given, defined


def path_of(prompt: Prompt) -> list[str]:
    asked, given, defined = read(prompt)
    path = [asked]
    while path[-1] not in given:
        path.append(defined[path[-1]][2])
    return path


def values_of(prompt: Prompt) -> dict[str, int]:
    """The value of every quantity of a problem, also of those that the answer does not need."""
    _, values, defined = read(prompt)
    values = dict(values)
    while len(values) < len(values | defined):
        for name, (number, kind, before) in defined.items():
            if name not in values and before in values:
                values[name] = eval(f"{values[before]}{SIGNS[kind]}{number}")
    return values


@pytest.mark.parametrize("task", SETTINGS)
def test_the_worked_solution_follows_from_the_words_of_the_problem(task):
    for prompt in take(task):
        path, values, defined = path_of(prompt), values_of(prompt), read(prompt)[2]
        assert task.min_steps <= len(path) - 1 <= task.max_steps
        assert len(values) == len(path) + task.distractors
        assert all(0 <= value <= task.largest for value in values.values())
        told = {a: f"{a}{b.lower()}{defined[a][0]}{SIGNS[defined[a][1]]}" for a, b in pairwise(path)}
        lines = [f"{told[name]}." for name in path[:-1]]
        lines += [f"{path[-1]}{values[path[-1]]}.", f"So {path[-1]}={values[path[-1]]}."]
        for before, name in pairwise(path[::-1]):
            number, kind, _ = defined[name]
            assert kind in task.operations
            sign, start, value = SIGNS[kind], values[before], values[name]
            lines.append(f"{told[name]}={start}{sign}{number}={value}.")
        answer = values[path[0]]
        assert prompt.references == (" ".join([*lines, f"Answer: {answer}"]),)
        assert prompt.answer == str(answer)
        assert task.verify(prompt, prompt.references[0]) == 1.0
        assert task.verify(prompt, prompt.references[0] + "7") == 0.0


def test_no_place_of_a_sentence_tells_whether_it_is_needed():
    """The quantity that is given stands anywhere, and so do those that the answer does not need."""
    prompts = take(Chains(), count=2000)
    places = [prompt.messages[0]["content"].split(". ") for prompt in prompts]
    first_is_needed = [text[0][0] in path_of(prompt) for prompt, text in zip(prompts, places, strict=True)]
    # 9 to 13 of 12 to 16 quantities are needed
    assert 0.7 < sum(first_is_needed) / len(prompts) < 0.83
    letters = [text[0][0] for text in places]
    assert len(set(letters)) == 26


@pytest.mark.parametrize("task", SETTINGS)
def test_each_quantity_starts_at_most_one_other(task):
    prompts = take(task)
    for prompt in prompts:
        starts = [before for _, _, before in read(prompt)[2].values()]
        assert len(set(starts)) == len(starts)
    if task.distractors:
        beyond = [path_of(prompt)[0] in {row[2] for row in read(prompt)[2].values()} for prompt in prompts]
        assert any(beyond) != (task == SETTINGS[-1])
        assert not all(beyond)


def test_a_problem_fits_the_context_window_of_the_models_with_its_solution():
    tokenizer = character_tokenizer()
    for prompt in take(Chains(longer=2), "test") + take(Chains()):
        turns = [*prompt.messages, {"role": "assistant", "content": prompt.references[0]}]
        assert len(tokenizer.apply_chat_template(turns)["input_ids"]) < tokenizer.model_max_length
    lengths = [len(prompt.references[0]) for prompt in take(Chains(), count=2000)]
    assert min(lengths) >= 160
    assert max(lengths) < 272


def test_a_chain_is_in_one_split_whatever_its_letters_and_distractors_are():
    for split in ("train", "validation", "test"):
        for prompt in take(Chains(), split, 50):
            defined, path, values = read(prompt)[2], path_of(prompt), values_of(prompt)
            steps = tuple((defined[name][1], defined[name][0]) for name in path[-2::-1])
            assert split_of((values[path[-1]], steps)) == split


def test_longer_problems_are_held_out_only():
    task = Chains(longer=2)
    assert {len(path_of(prompt)) for prompt in take(task, "test")} == {15}
    assert take(task) == take(Chains())


def test_a_recipe_names_the_task_and_too_few_letters_are_refused():
    assert part("tasks", "chains") is Chains
    with pytest.raises(ValueError, match="need 27 quantities, and there are 26 letters"):
        Chains(max_steps=20, distractors=6)
    with pytest.raises(ValueError, match="chains needs 1 <= min_steps <= max_steps"):
        Chains(min_steps=13)
