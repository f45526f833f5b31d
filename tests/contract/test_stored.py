"""Answers and references that the parts of a run read are there, or the run is refused before it begins."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reflux import checks
from reflux.config.recipe import load_recipe
from reflux.errors import DataError, RefluxError
from reflux.loop import train
from reflux.training import Options

ASKED = {"prompt": "1+1?"}


def recipe(folder: Path, rows: list[dict[str, Any]], name: str = "opd", **overrides: Any) -> Any:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "jsonl", "path": str(path), "validation": str(path)}
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(name, {"task": task, **changes})


@pytest.mark.parametrize(
    ("name", "where", "split"),
    [
        ("opd", "evals.accuracy", "validation"),
        ("opd", "evals.teacher_accuracy", "validation"),
        ("opd", "evals.test_accuracy", "test"),
        ("rl", "rewards.verifier", "train"),
    ],
)
def test_a_grader_without_any_answer_is_refused(tmp_path: Path, name: str, where: str, split: str) -> None:
    evals = dict.fromkeys(load_recipe(name).evals, "none")
    kept = {f"evals__{key}": value for key, value in evals.items() if f"evals.{key}" != where}
    if where == "evals.test_accuracy":
        kept["evals__test_accuracy"] = {}
    with pytest.raises(DataError) as refused:
        checks.inputs(recipe(tmp_path, [ASKED, ASKED], name, **kept))
    assert str(refused.value).startswith(f"{where}: the grader 'math' compares with stored answers")
    assert f"no prompt of the split '{split}' has one" in str(refused.value)
    checks.inputs(recipe(tmp_path, [ASKED, {**ASKED, "answer": 2}], name, **kept))


def test_without_verdicts_no_answer_is_needed(tmp_path: Path) -> None:
    evals = {f"evals__{name}": "none" for name in load_recipe("opd").evals if "accuracy" in name}
    checks.inputs(recipe(tmp_path, [ASKED], **evals))
    checks.inputs(recipe(tmp_path, [ASKED], task__grader="json:dumps"))


def test_fine_tuning_without_references_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    good = {**ASKED, "answer": 2, "references": ["2"]}
    bad = {**ASKED, "answer": 2}
    for rows, count in (([bad] * 3, "3 of 3"), ([good, bad, good], "1 of 3")):
        cfg = recipe(tmp_path, rows, "sft")
        with pytest.raises(RefluxError, match=rf"{count} training prompts have none .*task\.keys"):
            asyncio.run(train(cfg, Options(tmp_path / "run")))
        assert not (tmp_path / "run").exists()
    checks.inputs(recipe(tmp_path, [good], "sft"))


def notes(cfg: Any) -> list[str]:
    return [text for text in checks.warnings(cfg) if "no answer" in text]


def test_answers_that_some_lines_lack_are_counted(tmp_path: Path) -> None:
    some = [{**ASKED, "answer": 2}, ASKED, ASKED]
    counted = "task: 2 of the 3 prompts in .*own.jsonl have no answer .the first is train/2"
    (note,) = [
        text for text in checks.warnings(recipe(tmp_path, some)) if "no answer (the first is train" in text
    ]
    assert re.match(counted, note)
    silent = {f"evals__{name}": "none" for name in load_recipe("opd").evals}
    for rows, changes in ((some, silent), (some[:1], {}), (some, {"task__grader": "json:dumps"})):
        assert not [
            text for text in checks.warnings(recipe(tmp_path, rows, **changes)) if "no answer" in text
        ]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    same = {"prompt": "1+1?", "answer": 2}
    cfg = recipe(tmp_path, [{**same, "id": "a"}, {**same, "prompt": "2+2?", "id": "b"}])
    other = tmp_path / "test.jsonl"
    other.write_text(json.dumps({**same, "id": "c"}) + "\n" + json.dumps({**same, "prompt": "3+3?"}) + "\n")
    for field in ("test", "validation"):
        changes = {"validation": 0.5, field: str(other)}
        (note,) = [text for text in cfg_notes(cfg, **changes) if "also in" in text]
        assert note.startswith(
            f"task: 1 of the 2 prompts in {other} are also in {tmp_path / 'own.jsonl'}, which"
        )
    other.write_text(json.dumps({**same, "prompt": "3+3?", "id": "a"}) + "\n")
    assert not [text for text in cfg_notes(cfg, validation=str(other)) if "also in" in text]


def cfg_notes(cfg: Any, **changes: Any) -> list[str]:
    return checks.warnings(replace(cfg, task=replace(cfg.task, **changes)))
