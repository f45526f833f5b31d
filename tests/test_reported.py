"""What a run reports comes from test problems that nobody looked at on the way, drawn with a seed that is
used for nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import outside
from reflux.config.bases import RECIPES, recipe_names
from reflux.config.recipe import load_recipe
from reflux.evals.accuracy import Accuracy
from reflux.evals.agreement import Agreement
from reflux.evals.problems import HELD_OUT_SEED, TEST_SEED, problems, seen, told
from reflux.evals.teacher_accuracy import TeacherAccuracy
from reflux.reports.curves import accuracy_chart
from reflux.reports.evals import read_evals
from reflux.reports.scores import SearchScore
from reflux.runtime.watch import Silent
from reflux.storage.summary import reported
from reflux.tasks.glyphs import Glyphs
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.word_problems import WordProblems

SMALL: dict[str, Any] = {
    "evals__accuracy": {"problems": 3, "examples": 0},
    "evals__agreement": {"prompts": 2},
    "evals__teacher_accuracy": {"problems": 3, "examples": 0},
    "evals__test_accuracy": {"problems": 4},
}
EMBEDDED = ("toy", "hub", "reader", "two_domains", "glyphs")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(split, seed) of all that is asked of the task, in order."""
    objective_teachers: list[tuple[str, int]] = []
    prompts = outside.Chat.prompts

    def listened(self: Any, split: str, seed: int, start: int = 0) -> Any:
        objective_teachers.append((split, seed))
        return prompts(self, split, seed, start)

    monkeypatch.setattr(outside.Chat, "prompts", listened)
    return objective_teachers


def run(tiny_run: Callable[..., Any], recipe: str = "full", **changes: Any) -> Any:
    return tiny_run(
        recipe,
        **{
            "steps": 3,
            "eval_every": 1,
            "prompts_per_step": 2,
            "task": {"kind": "outside:Chat"},
            **SMALL,
            **changes,
        },
    )


def test_test_problems_are_asked_at_the_ends_and_never_between(
    tiny_run: Callable[..., Any], asked: list[tuple[str, int]]
) -> None:
    done = run(tiny_run)
    rows = done.rows("evals")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [set(row) - {"step"} for row in rows] == [
        {"accuracy", "agreement", "teacher_accuracy", "test_accuracy"},
        {"accuracy", "agreement"},
        {"accuracy", "agreement"},
        {"accuracy", "agreement", "test_accuracy"},
    ]
    assert [row["accuracy"]["problems"] for row in rows] == [3] * 4
    assert [rows[at]["test_accuracy"]["problems"] for at in (0, 3)] == [4, 4]
    assert rows[0]["test_accuracy"]["teacher"]["problems"] == 4
    assert "teacher" not in rows[3]["test_accuracy"]
    assert {seed for split, seed in asked if split == "test"} == {TEST_SEED}
    assert {split for split, seed in asked if seed == TEST_SEED} == {"test"}
    assert ("validation", HELD_OUT_SEED) in asked


def test_a_stopped_run_has_seen_no_test_problem_since_it_began(tiny_run: Callable[..., Any]) -> None:
    """And where it goes on, the end is asked once."""
    one = run(tiny_run)
    more = run(tiny_run, out=one.dir, resume=True, steps=5)
    assert [row["step"] for row in more.rows("evals") if "test_accuracy" in row] == [0, 3, 5]
    assert more.summary["accuracy_after"]["problems"] == 4


def test_the_summary_is_of_test_problems_and_says_so(tiny_run: Callable[..., Any]) -> None:
    done = run(tiny_run)
    first, last = done.rows("evals")[0], done.rows("evals")[-1]
    for name, table in (
        ("accuracy_before", first["test_accuracy"]), ("accuracy_after", last["test_accuracy"]),
        ("teacher_accuracy", first["test_accuracy"]["teacher"]),
    ):  # fmt: skip
        assert done.summary[name] == {
            key: table[key] for key in ("accuracy", "low", "high", "problems", "split")
        }
        assert done.summary[name]["split"] == "test"


def test_without_test_problems_the_summary_says_that_it_has_validation() -> None:
    row = {
        "step": 0,
        "accuracy": {"accuracy": 0.5, "split": "validation"},
        "teacher_accuracy": {"accuracy": 0.9, "split": "validation"},
    }
    found = reported([row])
    assert [found[name]["split"] for name in ("accuracy_before", "accuracy_after", "teacher_accuracy")] == [
        "validation"
    ] * 3
    assert reported([]) == {"accuracy_before": None, "accuracy_after": None, "teacher_accuracy": None}
    mixed = reported([{**row, "test_accuracy": {"accuracy": 0.1, "split": "test"}}])
    assert mixed["accuracy_before"]["split"] == "test"
    assert mixed["teacher_accuracy"] is None, "two splits in one table would not compare"


def test_the_curve_is_compared_with_the_teacher_on_the_same_problems() -> None:
    row = {"accuracy": 0.5, "problems": 3, "split": "validation"}
    test = {
        "accuracy": 0.4,
        "problems": 4,
        "split": "test",
        "teacher": {"accuracy": 0.8, "problems": 4, "split": "test"},
    }
    reported_teacher = SearchScore(0.8, problems=4, split="test")
    both = read_evals(
        [{"step": 0, "accuracy": row, "test_accuracy": test, "teacher_accuracy": {**row, "accuracy": 0.9}}]
    )
    assert accuracy_chart(both, reported_teacher).rows[-1] == (
        "teacher",
        "",
        *SearchScore(0.9, problems=3, split="validation").cells,
    )
    alone = read_evals([{"step": 0, "test_accuracy": test}])
    assert accuracy_chart(alone, reported_teacher).rows[-1] == ("teacher", "", *reported_teacher.cells)


@pytest.mark.parametrize("name", ["", "nobody"])
def test_a_teacher_that_is_not_there_is_not_asked(tiny_run: Callable[..., Any], name: str) -> None:
    done = run(tiny_run, steps=1, evals__test_accuracy={"problems": 2, "teacher": name})
    assert "teacher" not in done.rows("evals")[0]["test_accuracy"]
    assert done.summary["teacher_accuracy"] is None


def test_the_student_as_its_own_teacher_is_not_asked_twice(tiny_run: Callable[..., Any]) -> None:
    done = run(
        tiny_run,
        steps=1,
        teachers__main={"kind": "self", "context": {"kind": "same"}},
        evals__teacher_accuracy="none",
    )
    assert "teacher" not in done.rows("evals")[0]["test_accuracy"]


def test_test_problems_that_are_validation_problems_are_told(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    monkeypatch.setattr(Silent, "noted", lambda self, text: noted.append(text))
    lines = [{"prompt": f"say {n}", "answer": str(n)} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {"kind": "jsonl", "path": str(tmp_path / "data.jsonl"), "validation": 0.3}
    changes = {"steps": 1, "evals__agreement": "none", "evals__teacher_accuracy": "none"}
    held_out = run(tiny_run, task=task, **changes)
    assert held_out.rows("evals")[0]["test_accuracy"]["seen"] == 4
    assert [text for text in noted if "test problems" in text] == [told(4)], "once, before the first step"
    noted.clear()
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "say 99", "answer": "99", "id": "own"}))
    apart = run(tiny_run, task={**task, "test": str(tmp_path / "test.jsonl")}, **changes)
    assert apart.rows("evals")[0]["test_accuracy"]["seen"] == 0
    assert not any("test problems" in text for text in noted)


@pytest.mark.parametrize("evaluation", [Accuracy(), Agreement(), TeacherAccuracy()])
def test_on_the_way_validation_problems_are_asked(evaluation: Any) -> None:
    assert evaluation.split == "validation"


@pytest.mark.parametrize("base", EMBEDDED)
def test_every_scale_with_test_problems_reports_them(base: str) -> None:
    evals: dict[str, Any] = load_recipe("rl", {"base": base}).evals
    assert evals["accuracy"].split == "validation"
    assert evals["test_accuracy"].problems > evals["accuracy"].problems


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_asks_test_problems_on_the_way(recipe: str) -> None:
    assert all(
        evaluation.split != "test"
        for evaluation in load_recipe(recipe).evals.values()
        if evaluation.asked == "always"
    )


def test_the_seed_of_test_problems_stands_in_one_place() -> None:
    package = RECIPES.parent
    naming = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "TEST_SEED" in path.read_text()
    }
    assert naming == {"evals/problems.py", "evals/test_accuracy.py"}, "the second one only speaks of it"
    assert not any(f"{TEST_SEED}" in path.read_text() for path in package.rglob("*.toml"))


def test_test_problems_are_new_ones() -> None:
    """Of the embedded task: hardly one in common with those that recipes were once tuned on, and none with
    training or validation.
    """
    task = WordProblems(held_out=500)
    fresh = {prompt.messages[0]["content"] for prompt in problems(task, "test")}
    once_tuned_on = {prompt.messages[0]["content"] for prompt in task.prompts("test", 0)}
    validation = {prompt.messages[0]["content"] for prompt in problems(task, "validation")}
    training = {prompt.messages[0]["content"] for prompt in islice(task.prompts("train", 0), 5000)}
    assert len(fresh) > 490
    assert len(fresh & once_tuned_on) < 10
    assert not fresh & (validation | training)
    order = [prompt.answer for prompt in problems(Glyphs(), "test")]
    assert order != [prompt.answer for prompt in Glyphs().prompts("test", 0)]


def test_reflux_eval_asks_test_problems_and_says_where_they_are_validation_problems(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reflux.cli import evaluate

    objective_teachers: list[Accuracy] = []

    async def listened(cfg: Any, asked: Accuracy) -> dict[str, Any]:
        objective_teachers.append(asked)
        return {}

    monkeypatch.setattr(evaluate, "_accuracy", listened)
    evaluate.evaluate_model(student, None, 7, 0, None, [])
    assert objective_teachers == [replace(objective_teachers[0], split="test", problems=7, max_tokens=512)]
    assert "validation" not in capsys.readouterr().out
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {n}", "answer": str(n)}) for n in range(40)))
    evaluate.evaluate_model(student, "jsonl", 3, 0, None, [f"task.path={path}", "task.validation=0.3"])
    assert "3 of the test problems are also validation problems" in " ".join(capsys.readouterr().out.split())


def test_a_task_without_validation_problems_shows_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {n}", "answer": str(n)}) for n in range(4)))
    task = Jsonl(path=str(path), validation=0.0, test=str(path))
    assert seen(task, list(problems(task, "test"))) == 0
