"""Accuracy asks a scripted sampler, so every number of its table is known beforehand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.config.context import Generation
from reflux.config.step_context import SamplingParams
from reflux.evals.accuracy import Accuracy
from reflux.grading.graders import Graders
from reflux.metrics.intervals import bootstrap_mean, wilson
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.mix import Mix
from reflux.types import Attempt, Group, Prompt, TokenRollout


class Scripted:
    """Greedy: right where the question's number is below `greedy`. Samples: as many right as the number says.
    Keeps what it was asked.
    """

    def __init__(self, greedy: int = 3, failing: tuple[int, ...] = (), length: int = 4):
        self.greedy, self.failing, self.length = greedy, failing, length
        self.asked: list[tuple[Prompt, int, SamplingParams]] = []

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        self.asked.append((prompt, n, draw))
        await asyncio.sleep(0)
        number = int(prompt.messages[0]["content"])
        texts = ["right" if sample < number else "wrong" for sample in range(n)]
        if draw.temperature == 0:
            texts = ["right" if number < self.greedy else "wrong"]
        finish: Any = "error" if number in self.failing else "length" if number == 0 else "stop"
        return [
            attempt(prompt, sample, text, finish, self.length + number) for sample, text in enumerate(texts)
        ]


def attempt(prompt: Prompt, sample: int, text: str, finish: Any, length: int) -> Attempt:
    ids_T, mask_T = np.zeros(length, dtype=np.int64), np.ones(length, dtype=bool)
    rollout = TokenRollout(
        prompt=prompt, sample=sample, version=0, finish=finish, mask_T=mask_T,
        logp_T=np.zeros(length, dtype=np.float32),
        prompt_tokens=ids_T, tokens_T=ids_T, text=text, messages=prompt.messages,
    )  # fmt: skip
    return Attempt(rollout)


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders() as open_graders:
        yield open_graders


def task(tmp_path: Path, n: int = 8, **fields: Any) -> Jsonl:
    path = tmp_path / f"test{n}.jsonl"
    lines = [
        {"prompt": str(k), "answer": "right", "route": "even" if k % 2 == 0 else "odd", "id": f"q{k}"}
        for k in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return Jsonl(str(path), **{"validation": str(path), "test": str(path), "grader": "exact", **fields})


def ask(accuracy: Accuracy, task: Any, graders: Graders, sampler: Scripted, **fields: Any) -> dict[str, Any]:
    told = {"task": task, "seed": 1, "generation": Generation(stop=("\n\n",)), **fields}
    return asyncio.run(
        accuracy.measure(tiny.evaluation(sampler, graders=graders, positions=24, step=5, **told))
    )


def test_greedy_accuracy_with_its_interval_lengths_and_routes(tmp_path: Path, graders: Graders) -> None:
    table = ask(Accuracy(examples=0), task(tmp_path), graders, Scripted())
    low, high = wilson(3, 8)
    expected = {
        "problems": 8,
        "split": "validation",
        "accuracy": 3 / 8,
        "low": low,
        "high": high,
        "ungraded": 0,
        "truncated": 1 / 8,
        "mean_tokens": 7.5,
        "examples": [],
    }
    assert {key: table[key] for key in expected} == expected
    assert (table["accuracy.even"], table["accuracy.even.problems"], table["accuracy.odd"]) == (
        2 / 4,
        4,
        1 / 4,
    )
    assert (table["accuracy.odd.low"], table["accuracy.odd.high"]) == wilson(1, 4)
    assert json.loads(json.dumps(table)) == table


def test_what_could_not_be_judged_is_counted_and_in_no_mean(tmp_path: Path, graders: Graders) -> None:
    table = ask(Accuracy(), task(tmp_path), graders, Scripted(failing=(0, 7)))
    assert (table["problems"], table["ungraded"], table["accuracy"]) == (8, 2, 2 / 6)
    assert (table["low"], table["high"]) == wilson(2, 6)
    nothing = ask(Accuracy(samples=2), task(tmp_path, grader="none"), graders, Scripted())
    assert [nothing[key] for key in ("accuracy", "low", "high", "avg@2", "pass@2", "pass@2.low")] == [
        None
    ] * 6
    assert (nothing["ungraded"], nothing["ungraded_samples"]) == (8, 16)


def test_samples_give_the_average_and_pass_at_k(tmp_path: Path, graders: Graders) -> None:
    table = ask(Accuracy(problems=4, samples=3, k=2), task(tmp_path), graders, Scripted())
    # 0, 1, 2 and 3 of 3 right
    averages, passes = [0, 1 / 3, 2 / 3, 1], [0, 2 / 3, 1, 1]
    assert (table["avg@3"], table["pass@2"]) == (pytest.approx(0.5), pytest.approx(np.mean(passes)))
    assert (table["avg@3.low"], table["avg@3.high"]) == pytest.approx(bootstrap_mean(averages, 1))
    assert (table["pass@2.low"], table["pass@2.high"]) == pytest.approx(bootstrap_mean(passes, 1))
    assert table["samples"] == 3
    assert table["accuracy"] == 3 / 4


def test_problems_that_are_all_equal_have_the_interval_of_no_or_only_successes(
    tmp_path: Path, graders: Graders
) -> None:
    """Drawing 30 equal problems anew draws nothing new, and 0 of 30 is not known to be 0."""
    path = tmp_path / "zeros.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": "0", "answer": "right", "id": f"z{k}"}) for k in range(30))
    )
    table = ask(
        Accuracy(samples=2), Jsonl(str(path), validation=str(path), grader="exact"), graders, Scripted()
    )
    assert (table["pass@2"], table["pass@2.low"], table["pass@2.high"]) == (0, *wilson(0, 30))
    assert (table["avg@2"], table["avg@2.low"], table["avg@2.high"]) == (0, *wilson(0, 30))
    path.write_text(
        "\n".join(json.dumps({"prompt": "9", "answer": "right", "id": f"n{k}"}) for k in range(30))
    )
    table = ask(
        Accuracy(samples=2), Jsonl(str(path), validation=str(path), grader="exact"), graders, Scripted()
    )
    assert (table["pass@2"], table["pass@2.low"], table["pass@2.high"]) == (1, *wilson(30, 30))


def test_the_table_records_the_split_it_asked(tmp_path: Path, graders: Graders) -> None:
    splits = ("train", "validation", "test")
    path = task(tmp_path).path
    files = Jsonl(path, validation=path, test=path, grader="exact")
    assert [
        ask(Accuracy(problems=2, split=split), files, graders, Scripted())["split"] for split in splits
    ] == list(splits)


def test_a_problem_with_too_few_judged_samples_has_no_pass_at_k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picky_grader.py").write_text("def picky(prompt, text):\n    return {'right': 1.0}[text]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Graders() as fresh:
        # started after the path was extended
        path = task(tmp_path).path
        table = ask(
            Accuracy(problems=4, samples=3, k=2),
            Jsonl(path, validation=path, grader="picky_grader:picky"),
            fresh,
            Scripted(),
        )
    assert (table["pass@2"], table["avg@3"], table["ungraded_samples"]) == (1.0, 1.0, 3 + 2 + 1)


def test_its_draws_are_its_own_and_asked_together(tmp_path: Path, graders: Graders) -> None:
    sampler = Scripted()
    ask(Accuracy(problems=5, samples=2, temperature=0.7), task(tmp_path), graders, sampler)
    draws = [(n, draw) for _, n, draw in sampler.asked]
    # the same at every step
    greedy = SamplingParams(
        step=0, purpose="eval", max_positions=24, temperature=0.0, stop=("\n\n",), cohort=5, completed=5
    )
    drawn = SamplingParams(
        step=5, purpose="eval", max_positions=24, temperature=0.7, stop=("\n\n",), cohort=5, completed=5
    )
    assert draws == [(1, greedy)] * 5 + [(2, drawn)] * 5
    assert [prompt.id for prompt, _, _ in sampler.asked] == [f"q{k}" for k in range(5)] * 2


def test_its_length_limit_is_its_own_where_it_has_one(tmp_path: Path, graders: Graders) -> None:
    sampler = Scripted()
    ask(Accuracy(max_tokens=99), task(tmp_path), graders, sampler)
    assert {draw.max_positions for _, _, draw in sampler.asked} == {99}


def test_the_same_problems_are_the_examples(tmp_path: Path, graders: Graders) -> None:
    before, after = (
        ask(Accuracy(examples=2), task(tmp_path), graders, Scripted(greedy))["examples"] for greedy in (0, 1)
    )
    assert before[0] == {
        "id": "q0",
        "prompt": "0",
        "answer": "right",
        "text": "wrong",
        "verdict": 0.0,
        "finish": "length",
    }
    assert [example["id"] for example in before] == [example["id"] for example in after] == ["q0", "q1"]
    assert [example["verdict"] for example in after] == [1.0, 0.0]


def test_a_mix_has_its_accuracy_by_part(tmp_path: Path, graders: Graders) -> None:
    mix = Mix({"few": task(tmp_path, 4), "many": task(tmp_path, 8)})
    table = ask(Accuracy(), mix, graders, Scripted())
    assert [table[f"accuracy.{name}"] for name in ("few", "many")] == [3 / 4, 3 / 8]
    assert [table[f"accuracy.{name}.problems"] for name in ("few", "many", "even", "odd")] == [4, 8, 6, 6]


def test_parts_of_verdicts_have_their_means_over_the_answers_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Style is number / 10, known of all but number 3; the part `low` may not take the place of the
    interval's end.
    """
    (tmp_path / "styled_grader.py").write_text(
        "from reflux.types import Reward\n"
        "def styled(prompt, text):\n"
        "    n = int(prompt.messages[0]['content'])\n"
        "    return Reward(None if n == 5 else float(text == 'right'), parts={'low': 1.0} if n == 3 else "
        "{'style': n / 10, 'low': 0.5})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Graders() as fresh:
        # started after the path was extended
        path = task(tmp_path).path
        table = ask(
            Accuracy(examples=6),
            Jsonl(path, validation=path, grader="styled_grader:styled"),
            fresh,
            Scripted(),
        )
    style = [n / 10 for n in range(8) if n != 3]
    assert table["parts"] == ["part.low", "style"]
    assert table["style"] == pytest.approx(np.mean(style))
    assert (table["style.low"], table["style.high"]) == bootstrap_mean(style, 1)
    assert table["style.even"] == pytest.approx(np.mean([0, 0.2, 0.4, 0.6]))
    assert table["style.odd"] == pytest.approx(np.mean([0.1, 0.5, 0.7]))
    assert (table["style.odd.low"], table["style.odd.high"]) == bootstrap_mean([0.1, 0.5, 0.7], 1)
    assert table["part.low"] == pytest.approx((7 * 0.5 + 1) / 8)
    # equal: nothing known
    assert (table["part.low.even"], table["part.low.even.low"], table["part.low.even.high"]) == (
        0.5,
        None,
        None,
    )
    assert (table["accuracy"], table["ungraded"], table["low"]) == (3 / 7, 1, wilson(3, 7)[0])
    assert [example["parts"].get("style") for example in table["examples"]] == [0, 0.1, 0.2, None, 0.4, 0.5]
    assert json.loads(json.dumps(table)) == table


def test_one_route_is_no_split(tmp_path: Path, graders: Graders) -> None:
    table = ask(Accuracy(problems=1), task(tmp_path), graders, Scripted())
    assert not [key for key in table if key.startswith("accuracy.")]


def test_partial_verdicts_count_in_part(
    tmp_path: Path, graders: Graders, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partial_grader.py").write_text(
        "def partial(prompt, text):\n    return 1.0 if text == 'right' else 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Graders() as fresh:
        # started after the path was extended
        path = task(tmp_path).path
        table = ask(
            Accuracy(samples=2, problems=2),
            Jsonl(path, validation=path, grader="partial_grader:partial"),
            fresh,
            Scripted(1),
        )
    assert (table["accuracy"], table["avg@2"], table["pass@2"]) == (
        0.75,
        pytest.approx((0.5 + 0.75) / 2),
        0.5,
    )


def test_the_routed_ceiling_of_texts_is_that_of_each_teacher_on_its_own_problems(
    tiny_run: Any, teacher: str, student: str
) -> None:
    tables = {"one": teacher, "two": student}
    teachers = {
        name: {"model": model, "alias": "main", "routes": [route]}
        for (name, model), route in zip(tables.items(), ("even", "odd"), strict=True)
    }
    asked = {
        name: {"kind": "teacher_accuracy", "teacher": name, "problems": 6} for name in ("main", "one", "two")
    }
    evals = {f"evals__{name}": {**table} for name, table in asked.items()}
    done = tiny_run(
        "opd", steps=0, task={"kind": "outside:Chat"}, teachers={"main": "none", **teachers}, **evals
    )
    (row,) = done.rows("evals")
    texts = {name: [example["text"] for example in row[name]["examples"]] for name in asked}
    assert texts["one"] != texts["two"]
    assert texts["main"] == [texts["one" if place % 2 == 0 else "two"][place] for place in range(6)]
    for name, route in (("one", "even"), ("two", "odd")):
        keys = [f"accuracy.{route}{end}" for end in ("", ".low", ".high", ".problems")]
        assert [row["main"][key] for key in keys] == [row[name][key] for key in keys]
    assert row["main"]["accuracy"] == pytest.approx(
        (row["main"]["accuracy.even"] + row["main"]["accuracy.odd"]) / 2
    )
    assert row["main"]["problems"] == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"problems": 0}, "problems >= 1"),
        ({"samples": -1}, "samples >= 0"),
        ({"samples": 2, "k": 3}, "1 <= k <= samples"),
        ({"k": 1}, "1 <= k <= samples"),
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"split": "dev"}, "split"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Accuracy(**fields)


def test_a_split_without_problems_is_explained(graders: Graders) -> None:
    empty = SimpleNamespace(prompts=lambda split, seed, start=0: iter(()))
    with pytest.raises(ValueError, match="no problems in its split 'validation'"):
        ask(Accuracy(), empty, graders, Scripted())
