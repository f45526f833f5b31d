"""`reflux difficulty`: multiplicities from their definition, prompts that are all kept, files that are whole,
counts that go on.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import outside
import tiny
from reflux import checks
from reflux.cli.difficulty import PARTIAL, balance_prompts
from reflux.config.recipe import load_recipe, to_table
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError, ModelError, RunError
from reflux.evals.problems import problems
from reflux.evals.prompt_difficulty import (
    FIRST,
    Counted,
    as_line,
    copies_of,
    measured,
    multiplicities,
    repeated,
    training_prompts,
)
from reflux.tasks.gsm8k import Gsm8k
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.lines import held_out
from reflux.tasks.mix import Mix
from reflux.tasks.word_problems import WordProblems
from reflux.types import Attempt, Group, Prompt, Reward

# --- multiplicities


def test_multiplicities_by_hand() -> None:
    """Bins of 8, 3, 1 and 6: 8/3 = 2.67 rounds to 3, 8/1 = 8, 8/6 = 1.33 to 1; unsolved ones stay as they
    are.
    """
    counts = [0] * 8 + [2] * 3 + [5] + [8] * 6
    assert multiplicities(counts, 8) == [1] * 8 + [3] * 3 + [8] + [1] * 6
    assert multiplicities(counts, 8, cap=2) == [1] * 8 + [2] * 3 + [2] + [1] * 6
    # 3/2 + 1/2 = 2 exactly
    assert multiplicities([4] * 2 + [3] * 3, 8) == [2] * 2 + [1] * 3
    assert multiplicities([], 8) == []
    assert multiplicities([0, 0, 0], 8) == [1, 1, 1]


@given(counts=st.lists(st.integers(0, 8), max_size=200), cap=st.integers(1, 12))
def test_multiplicities_are_those_of_the_formula_and_flatten(counts: list[int], cap: int) -> None:
    found = multiplicities(counts, 8, cap)
    sizes = Counter(counts)
    fullest = max(sizes.values(), default=0)
    for correct, times in zip(counts, found, strict=True):
        wanted = min(max(math.floor(Fraction(fullest, sizes[correct]) + Fraction(1, 2)), 1), cap)
        assert times == (1 if correct == 0 else wanted)
        assert times >= 1
        if correct and times < cap:
            assert Fraction(2 * fullest, 3) <= sizes[correct] * times <= Fraction(4 * fullest, 3)
        if sizes[correct] == fullest:
            assert times == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([9], 8), "prompt 0 has 9 correct answers"),
        (([0, -1], 8), "prompt 1 has -1 correct answers"),
        (([1], 8, 0), "cap must be at least 1"),
        (([], 0), "n_samples and cap"),
    ],
)
def test_bad_counts_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        multiplicities(*arguments)


# --- prompts


def prompt(name: str, **fields: Any) -> Prompt:
    return Prompt(name, ({"role": "user", "content": f"what is {name}?"},), **fields)


def test_a_prompt_that_could_not_be_judged_is_kept_once_and_in_no_bin() -> None:
    """With it in the bin of 1 that bin would hold two, and they would be copied less."""
    verdicts = [(4, 0)] * 3 + [(1, 0), (1, 2), (0, 4)]
    counted = [
        Counted(prompt(f"{i}"), correct, 4, ungraded) for i, (correct, ungraded) in enumerate(verdicts)
    ]
    assert copies_of(counted) == [1, 1, 1, 3, 1, 1]
    assert copies_of(counted[4:]) == [1, 1]
    assert copies_of([]) == []


def test_every_prompt_stays_and_copies_have_ids_of_their_own() -> None:
    prompts = [prompt("a", answer="1"), prompt("b"), prompt("a#2")]
    found = list(repeated(prompts, [3, 1, 2]))
    # "a#2" is taken
    assert [one.id for one in found] == ["a", "a#3", "a#4", "b", "a#2", "a#2#2"]
    assert [one.messages for one in found] == [
        one.messages for one, times in zip(prompts, (3, 1, 2), strict=True) for _ in range(times)
    ]
    assert found[1].answer == "1"
    assert len({one.id for one in found}) == len(found)


@given(share=st.floats(0, 0.99), name=st.text("ab#2", min_size=1, max_size=6), copy=st.integers(2, 99))
def test_a_copy_is_on_the_same_side_of_the_split_as_its_original(share: float, name: str, copy: int) -> None:
    assert held_out(prompt("train/7"), share) == held_out(prompt(f"train/7#{copy}"), share)
    assert held_out(prompt(name), share) == held_out(prompt(f"{name}#{copy}"), share)


def lines(path: Path, count: int, **fields: Any) -> Jsonl:
    rows = [
        {"prompt": f"{path.stem} {k}", "answer": f"{k % 2}", "id": f"{path.stem}{k}"} for k in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Jsonl(str(path), **{"validation": 0.0, **fields})


def first_of(task: Any, count: int) -> list[Prompt]:
    """The first different training prompts."""
    found: dict[str, Prompt] = {}
    for one in task.prompts("train", 0):
        found.setdefault(one.id, one)
        if len(found) == count:
            return list(found.values())
    return []


def test_a_pass_over_finite_data_is_each_prompt_once(tmp_path: Path) -> None:
    task = lines(tmp_path / "a.jsonl", 37, validation=0.2)
    found, cut = training_prompts(task, seed=3)
    assert not cut
    assert [one.id for one in found] == list(
        dict.fromkeys(one.id for one in islice(task.prompts("train", 3), 400))
    )
    assert all(not held_out(one, 0.2) for one in found)
    some, cut = training_prompts(task, seed=3, limit=5)
    assert (cut, some) == (True, found[:5])


def test_a_mix_of_unequal_parts_is_read_to_the_end(tmp_path: Path) -> None:
    """The small part repeats long before the large one is through."""
    mix = Mix(
        {"few": lines(tmp_path / "few.jsonl", 3), "many": lines(tmp_path / "many.jsonl", 1500, weight=0.05)}
    )
    found, cut = training_prompts(mix, seed=0)
    assert (len(found), cut) == (1503, False)


def test_a_mix_in_a_mix_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of blocks one prompt is of the smallest part: far more than two blocks in a row bring
    nothing new.
    """
    monkeypatch.setattr("reflux.tasks.mix.BLOCK", 50)
    inner = Mix(
        {"few": lines(tmp_path / "few.jsonl", 2, weight=49.0), "many": lines(tmp_path / "many.jsonl", 5)},
        weight=1 / 49,
    )
    found, cut = training_prompts(Mix({"one": lines(tmp_path / "one.jsonl", 1), "rest": inner}), seed=0)
    assert (len(found), cut) == (8, False)


def test_an_endless_task_gives_its_first_prompts(tmp_path: Path) -> None:
    mix = Mix({"stories": WordProblems(), "few": lines(tmp_path / "few.jsonl", 3)})
    for task in (WordProblems(), mix):
        assert training_prompts(task, seed=0) == (first_of(task, FIRST), True)


def test_data_of_any_size_is_read_to_the_end(tmp_path: Path) -> None:
    """More than is read of a task that does not say whether it ends."""
    (tmp_path / "large.jsonl").write_text("".join(f'{{"prompt": "{k}"}}\n' for k in range(100_500)))
    found, cut = training_prompts(Jsonl(str(tmp_path / "large.jsonl"), validation=0.0), seed=0)
    assert (len(found), cut) == (100_500, False)


def test_a_task_of_ones_own_that_comes_to_no_end_is_asked_for_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reflux.evals.prompt_difficulty.UNKNOWN", 600)
    with pytest.raises(DataError, match=r"more than 600 different training prompts.*--prompts N"):
        training_prompts(outside.Chat(), seed=0)
    found, cut = training_prompts(outside.Chat(), seed=0, limit=900)
    assert (len(found), cut) == (900, True)


def test_who_ends_and_who_judges(tmp_path: Path) -> None:
    own, moody = lines(tmp_path / "a.jsonl", 3), lines(tmp_path / "b.jsonl", 3, grader="judges:moody")
    stories = "reflux.evals.prompt_difficulty:as_word_problem"
    tasks: list[tuple[Any, bool | None, str | None]] = [
        (own, True, "math"),
        (moody, True, "judges:moody"),
        (Gsm8k(), True, "math"),
        (WordProblems(), False, stories),
        (outside.Chat(), None, None),
        (Mix({"a": own, "g": Gsm8k()}), True, "math"),
        (Mix({"a": WordProblems(), "g": WordProblems(operations=("mul",), largest=99)}), False, stories),
        (Mix({"a": own, "b": moody}), True, None),
        (Mix({"a": own, "c": outside.Chat()}), None, None),
        (Mix({"a": WordProblems(), "c": outside.Chat()}), False, None),
    ]
    for task, finite, grader in tasks:
        assert (task.ends, task.judge) == (finite, grader)


@pytest.mark.parametrize(
    "made", ["Answer: {}", "{}", "Answer: {}.5", "Answer: 0{}", "#### {}", "\\boxed{{{}}}", ""]
)
def test_a_written_story_is_judged_as_the_task_judges_it(tmp_path: Path, made: str) -> None:
    asked = next(WordProblems().prompts("train", 0))
    (tmp_path / "p.jsonl").write_text(json.dumps(as_line(asked)) + "\n")
    task = Jsonl(str(tmp_path / "p.jsonl"), validation=0.0, grader=WordProblems().judge or "")
    text = made.format(asked.answer)
    assert task.verify(next(task.prompts("train", 0)), text) == WordProblems().verify(asked, text)


@pytest.mark.parametrize(
    "given_",
    [
        prompt("a", answer="3", references=("x", "y"), route="mul"),
        prompt("b"),
        Prompt("c", ({"role": "system", "content": "s"}, {"role": "user", "content": "q"}), "1"),
    ],
)
def test_what_is_written_is_what_the_task_jsonl_reads(tmp_path: Path, given_: Prompt) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(as_line(given_)) + "\n")
    assert next(Jsonl(str(tmp_path / "p.jsonl"), validation=0.0).prompts("train", 0)) == given_


# --- counting


class Scripted:
    """Answers as many right as the prompt's number says; remembers the cohorts."""

    def __init__(self) -> None:
        self.cohorts: list[int] = []

    async def sample(self, asked: Prompt, n: int, draw: SamplingParams) -> Group:
        self.cohorts.append(draw.cohort)
        return [Attempt(tiny.rollout(2, sample=sample)) for sample in range(n)]


class Verdicts:
    """By prompt: c of n right, and None for the last one of prompt 2."""

    def __init__(self, samples: int):
        self.samples, self.asked = samples, 0

    async def judge_attempts(self, task: Any, attempts: Sequence[Attempt]) -> list[Reward]:
        found = []
        for _ in range(len(attempts) // self.samples):
            right = self.asked % (self.samples + 1)
            values = [1.0] * right + [0.0] * (self.samples - right)
            found += [
                Reward(None, error="no idea") if self.asked == 2 and i == self.samples - 1 else Reward(v)
                for i, v in enumerate(values)
            ]
            self.asked += 1
        return found


def test_counts_come_in_order_a_few_prompts_at_a_time() -> None:
    sampler = Scripted()
    asked = tiny.evaluation(sampler, graders=Verdicts(3))

    async def collect() -> list[list[Counted]]:
        prompts = [prompt(f"{i}") for i in range(5)]
        return [
            chunk async for chunk in measured(asked, prompts, 3, SamplingParams(0, "score", 9), at_once=2)
        ]

    chunks = asyncio.run(collect())
    assert [[entry.prompt.id for entry in chunk] for chunk in chunks] == [["0", "1"], ["2", "3"], ["4"]]
    assert [(entry.correct, entry.samples, entry.ungraded) for chunk in chunks for entry in chunk] == [
        (0, 3, 0),
        (1, 3, 0),
        (2, 3, 1),
        (3, 3, 0),
        (0, 3, 0),
    ]
    assert sampler.cohorts == [2, 2, 2, 2, 1]


# --- the command


@pytest.fixture
def recipe(student: str, tmp_path: Path) -> Any:
    rows = [{"prompt": f"{k}" * (k % 3 + 1), "answer": "a", "id": f"q{k}"} for k in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = [
        f"learner.model={student}",
        "sampler.max_tokens=6",
        "task.kind=jsonl",
        f"task.path={tmp_path / 'data.jsonl'}",
    ]
    changes += ["task.grader=judges:moody", "task.validation=0.0", "threads=1"]

    def run(out: str = "out", samples: int = 4, prompts: int = 0) -> tuple[list[Any], list[Any]]:
        balance_prompts("opd", changes, samples, prompts, (1.0, 0.95), 8, tmp_path / out)
        counts, balanced = (
            (tmp_path / out / name).read_text().splitlines() for name in ("difficulty.jsonl", "prompts.jsonl")
        )
        return list(map(json.loads, counts)), list(map(json.loads, balanced))

    return run


def test_the_command_writes_counts_and_a_balanced_file(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, prompts = recipe()
    assert sorted(row["id"] for row in counts) == [f"q{k}" for k in range(9)]
    assert all(0 <= row["correct"] <= row["samples"] == 4 for row in counts)
    assert {row["id"]: row["ungraded"] for row in counts} == {f"q{k}": 4 * (k == 3) for k in range(9)}
    bins = Counter(row["correct"] for row in counts if not row["ungraded"])
    assert len(bins) > 1
    judged = [row["correct"] for row in counts if not row["ungraded"]]
    assert [row["copies"] for row in counts if not row["ungraded"]] == multiplicities(judged, 4)
    assert Counter(row["id"].split("#")[0] for row in prompts) == {row["id"]: row["copies"] for row in counts}
    again = Jsonl(str(tmp_path / "out" / "prompts.jsonl"), validation=0.0)
    assert {one.id for one in islice(again.prompts("train", 0), len(prompts))} == {
        row["id"] for row in prompts
    }
    behaviour = " ".join(capsys.readouterr().out.split())
    assert "1 prompt(s) have answers that could not be judged. Each is kept once" in behaviour
    assert "correct of 4" in behaviour
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_a_killed_call_goes_on_to_the_same_files(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe("whole")
    from reflux.evals import prompt_difficulty

    real, seen = prompt_difficulty.measured, []

    async def interrupted(evaluation: Any, prompts: Any, samples: int, draw: SamplingParams) -> Any:
        seen.append(len(prompts))
        async for chunk in real(evaluation, prompts, samples, draw, at_once=4):
            yield chunk
            if len(seen) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("reflux.cli.difficulty.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe("killed")
    assert not (tmp_path / "killed" / "prompts.jsonl").exists()
    with pytest.raises(RunError, match=r"made with other settings \(samples\)"):
        recipe("killed", samples=3)
    assert recipe("killed") == whole
    assert seen == [9, 5]


def test_lines_cut_short_by_kills_do_not_spoil_the_counts(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe("whole")
    from reflux.evals import prompt_difficulty

    real = prompt_difficulty.measured

    async def one_chunk(evaluation: Any, prompts: Any, samples: int, draw: SamplingParams) -> Any:
        async for chunk in real(evaluation, prompts, samples, draw, at_once=2):
            yield chunk
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reflux.cli.difficulty.measured", one_chunk)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                recipe("killed")
            with (tmp_path / "killed" / PARTIAL).open("a") as file:
                file.write('{"id": "q')
    assert recipe("killed") == whole


def test_a_missing_student_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"learner\.model"):
        balance_prompts(
            "opd", [f"learner.model={tmp_path / 'nowhere'}"], 1, 2, (1.0, 0.95), 8, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# --- training on what was written


@pytest.fixture
def balanced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str) -> Any:
    """`balanced(overrides)`: the config that recipe.toml gives. Nothing is sampled: every prompt has 2 of 4
    right.
    """

    async def counted(evaluation: Any, prompts: Any, samples: int, draw: SamplingParams) -> Any:
        yield [Counted(one, k % 2 + 1, samples) for k, one in enumerate(prompts)]

    monkeypatch.setattr("reflux.cli.difficulty.measured", counted)

    def run(overrides: list[str], name: str = "opd") -> Any:
        balance_prompts(
            name, [f"learner.model={student}", *overrides], 4, 6, (1.0, 0.95), 8, tmp_path / "out"
        )
        return load_recipe(tmp_path / "out" / "recipe.toml")

    return run


def test_the_recipe_that_is_written_trains_on_what_was_written(
    balanced: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], student: str
) -> None:
    """A jsonl task with other columns and an instruction: none of it is left, so nothing is asked for twice
    or not found.
    """
    rows = [{"question": f"how much is {k}?", "answer": f"{k}", "id": f"q{k}"} for k in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "and 9?", "answer": "9"}))
    data = [
        "task.kind=jsonl",
        f"task.path={tmp_path / 'data.jsonl'}",
        f"task.test={tmp_path / 'test.jsonl'}",
        "task.validation=0.0",
    ]
    changes = [
        *data,
        'task.keys={prompt = "question"}',
        "task.instruction=Think.",
        "task.grader=exact",
        "steps=7",
    ]
    found, old = balanced(changes), load_recipe("opd", [f"learner.model={student}", *changes])
    asked = [one.messages[0]["content"] for one in first_of(found.task, 6)]
    assert sorted(asked) == [f"how much is {k}?\n\nThink." for k in range(6)]
    assert [one.messages[0]["content"] for one in found.task.prompts("test", 0)] == ["and 9?\n\nThink."]
    assert found.task.grader == "exact"
    assert {key for key, value in to_table(found).items() if value != to_table(old)[key]} == {"task"}
    behaviour = capsys.readouterr().out
    assert f"reflux run {tmp_path / 'out' / 'recipe.toml'}" in behaviour
    assert "no validation prompts" in behaviour
    assert "no test prompts" not in behaviour
    checks.join(found)
    # which would ask validation prompts
    checks.inputs(replace(found, evals={}))


def test_a_mix_of_stories_keeps_its_judge_its_routes_and_its_held_out_prompts(
    balanced: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        "task.parts.add.kind=word_problems",
        'task.parts.mul={kind="word_problems", operations=["mul"], largest=99}',
    ]
    held_out = ["task.parts.add.held_out=3", "task.parts.mul.held_out=3"]
    overrides = ["task.kind=mix", *parts, *held_out]
    found, old = balanced(overrides), load_recipe("opd", overrides)
    assert found.task.routes == frozenset(["add", "mul"])
    for split in ("validation", "test"):
        assert list(found.task.prompts(split, 0)) == list(problems(old.task, split))
    for one in found.task.prompts("test", 0):
        for text in (f"Answer: {one.answer}", f"#### {one.answer}"):
            assert found.task.verify(one, text) == old.task.verify(one, text)
    behaviour = capsys.readouterr().out
    assert "without the weights of the mix" in behaviour
    assert "judges answers by" not in behaviour


def test_a_judge_that_jsonl_does_not_know_is_said(balanced: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert balanced(["task.kind=outside:Chat"]).task.grader == "math"
    assert 'recipe.toml judges answers by the grader "math"' in capsys.readouterr().out


def test_a_folder_with_counts_is_not_written_over(recipe: Any) -> None:
    recipe(prompts=2)
    with pytest.raises(RunError, match="already contains counts"):
        recipe(prompts=2)


def test_a_limit_takes_the_first_prompts(recipe: Any) -> None:
    counts, _ = recipe(prompts=3)
    assert len(counts) == 3


def test_no_prompts_is_said(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
    monkeypatch.setattr("reflux.cli.difficulty.training_prompts", lambda *_: ([], False))
    with pytest.raises(DataError, match="no training prompts"):
        recipe()
