"""The embedded pair for tasks with tools: the lessons, the cards, and that both are what they are said to
be.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import reflux
from played import TOKENIZER, played
from reflux.assets import folder, make, tool_models
from reflux.assets.characters import CHARACTERS, SPECIALS, character_tokenizer
from reflux.assets.text_models import IGNORED, blank, train
from reflux.assets.tool_lessons import FAULTY, FIRST_STEP, encoded, lesson, tool_lessons
from reflux.assets.tool_models import TASKS, TOOL_SPECS, ToolSpec, attempts, encode
from reflux.config.recipe import load_recipe
from reflux.tasks.calculator import Calculator
from reflux.tasks.ledger import Ledger
from reflux.tasks.shopping import Shopping

NAMES = ("tool_student", "tool_teacher")
TINY = ToolSpec("tiny", layers=1, steps=2, seed=0, width=16, inner=16, heads=2, batch=4, warmup=1)
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


# --- lessons


@pytest.mark.parametrize("task", [Shopping(drift_every=1), Calculator(), Ledger()])
def test_a_lesson_has_the_tokens_and_the_mask_of_the_sampled_attempt(task: Any) -> None:
    """Rendered as the driver renders it. Only right turns, with their end token, are trained on."""
    for number, prompt in enumerate(islice(task.prompts("train", 0), 12)):
        made = lesson(task, prompt, number)
        texts = [message["content"] for message in made.messages if message["role"] == "assistant"]
        rollout = played(task, prompt, texts, number)
        ids, learnt = encoded(made, TOKENIZER)
        assert ids == [*rollout.prompt_tokens, *rollout.tokens_T]
        if all(made.right):
            assert learnt == [False] * len(rollout.prompt_tokens) + rollout.mask_T.tolist()
            assert texts == task.worked(prompt, number)
        assert task.verify(prompt, task.evidence(rollout)) == 1.0


def test_a_faulty_turn_is_followed_by_an_error_and_not_trained_on() -> None:
    made = [
        one
        for one in islice(tool_lessons([Shopping(drift_every=1), Calculator()], 0), 400)
        if not all(one.right)
    ]
    assert 0 < len(made) < 0.3 * 400
    for one in made:
        ids, learnt = encoded(one, TOKENIZER)
        spoken = TOKENIZER.decode([i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt])
        said = [message for message in one.messages[1:] if message["role"] == "assistant"]
        told = [message for message in one.messages[1:] if message["role"] == "user"]
        right = [m["content"] for m, is_right in zip(said, one.right, strict=True) if is_right]
        assert spoken == "".join(f"{text}<end>" for text in right)
        for text, reply, is_right in zip(said, told, one.right, strict=False):
            assert reply["content"].startswith("Error:") == (not is_right), text
    assert 0 < FAULTY < 0.1


def test_every_lesson_has_prices_of_its_own_that_no_run_has() -> None:
    task = Shopping(drift_every=1)
    some = list(islice(tool_lessons([task], 0), 200))
    prices = {}
    for number, one in enumerate(some):
        (prompt,) = islice(task.prompts("train", 0, number), 1)
        assert one == lesson(task, prompt, FIRST_STEP + number)
        prices.setdefault(task.price("figs", FIRST_STEP + number), number)
    assert len(prices) == 20


def test_the_lessons_are_of_each_task_in_turn() -> None:
    first = [one.messages[0]["content"].split()[0] for one in islice(tool_lessons(TINY.lessons, 3), 6)]
    assert first == ["Buy", "Work", "Start"] * 2


def test_batches_are_padded_and_only_labels_of_right_turns_are_left() -> None:
    some = list(islice(tool_lessons(TINY.lessons, 0), 5))
    ids_BT, labels_BT = encode(some, TOKENIZER)
    for one, ids_T, labels_T in zip(some, ids_BT, labels_BT, strict=True):
        ids, learnt = encoded(one, TOKENIZER)
        assert ids_T[: len(ids)].tolist() == ids
        assert (ids_T[len(ids) :] == TOKENIZER.pad_token_id).all()
        expected = [i if is_learnt else IGNORED for i, is_learnt in zip(ids, learnt, strict=True)]
        assert labels_T[: len(ids)].tolist() == expected
        assert (labels_T[len(ids) :] == IGNORED).all()


def test_the_same_seed_makes_the_same_model_and_another_does_not() -> None:
    def made(spec: ToolSpec) -> Any:
        return train(blank(spec, TOKENIZER), spec, attempts(spec, TOKENIZER)).state_dict()

    one, again, other = made(TINY), made(TINY), made(replace(TINY, seed=1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_making_writes_a_whole_folder_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TOOL_SPECS, "tool_student", TINY)
    monkeypatch.setattr(tool_models, "PROBLEMS", 6)
    monkeypatch.setitem(tool_models.EXAM, "sampler", {"kind": "hf", "max_tokens": 8})
    make.main(["--only", "tool_student", "--out", str(tmp_path), "--threads", "1"])
    assert {path.name for path in (tmp_path / "tool_student").iterdir()} == FILES
    card = (tmp_path / "tool_student" / "README.md").read_text()
    assert "- held-out problems: 0/6 right, greedy (0.0%" in card
    assert "- held-out problems of `ledger`: 0/2 right" in card
    assert "held-out problems: 0/6 right" in capsys.readouterr().out
    assert "2 steps of 4 attempts, seed 0, 1 thread(s)" in card


# --- the shipped pair


def shipped(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(name))


def stated(name: str) -> dict[str, tuple[int, int]]:
    """(right, problems) in the model's card, by what it was asked."""
    card = (folder(name) / "README.md").read_text()
    found = re.findall(r"^- (.+): ([0-9]+)/([0-9]+) right, greedy \(", card, re.MULTILINE)
    return {title: (int(right), int(problems)) for title, right, problems in found}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_exactly_these_files_in_float32(name: str) -> None:
    assert {path.name for path in folder(name).iterdir()} == FILES
    with safe_open(folder(name) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118


def test_both_together_are_small() -> None:
    sizes = [path.stat().st_size for name in NAMES for path in folder(name).iterdir()]
    assert sum(sizes) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_models_are_what_their_specs_say(name: str) -> None:
    spec, model = TOOL_SPECS[name], shipped(name)
    made = blank(spec, character_tokenizer()).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in made.items()
    }
    assert model.config.vocab_size == len(SPECIALS) + len(CHARACTERS)
    card = (folder(name) / "README.md").read_text()
    assert f"{spec.steps} steps of {spec.batch} attempts, seed {spec.seed}, 1 thread(s)" in card
    assert f"python -m reflux.assets.make --only {name}`" in card
    assert "trained from nothing" in card
    assert set(stated(name)) == {"held-out problems", *(f"held-out problems of `{kind}`" for kind in TASKS)}
    assert stated(name)["held-out problems"][1] == 500
    assert sum(problems for title, (_, problems) in stated(name).items() if "`" in title) == 500


def test_the_teacher_calls_tools_rightly_and_the_student_sometimes() -> None:
    """What the cards state, and the same models on some of the problems again."""
    shares = {name: np.divide(*stated(name)["held-out problems"]) for name in NAMES}
    assert shares["tool_teacher"] >= 0.95
    assert 0.1 <= shares["tool_student"] <= 0.35
    for name in NAMES:
        found = again(name)
        for kind in TASKS:
            right, problems = stated(name)[f"held-out problems of `{kind}`"]
            low, high = found[f"accuracy.{kind}.low"], found[f"accuracy.{kind}.high"]
            assert low <= right / problems <= high, (name, kind)


def again(name: str) -> dict[str, Any]:
    """The evaluation of the first 90 test problems."""
    import asyncio
    from unittest.mock import patch

    with patch.object(tool_models, "PROBLEMS", 90):
        return asyncio.run(tool_models.examined(folder(name)))


# --- the recipe


def test_the_recipe_runs_with_the_pair_and_its_teacher_is_asked_again(tmp_path: Path) -> None:
    """Three steps, and prices that change at each. At staleness 2 all attempts of these steps begin before
    the first one is completed.
    """
    changes = {
        "steps": 3,
        "prompts_per_step": 6,
        "threads": 1,
        "task.parts.shopping.drift_every": 1,
        "refresh": "none",
        **{f"evals.{name}": "none" for name in load_recipe("tools").evals},
    }
    reflux.run("tools", changes, out=tmp_path / "run")
    rows = {
        name: [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "attempts")
    }
    first, *later = (row["credit"]["freshness"] for row in rows["metrics"])
    assert first["supervision_drift"] == 0
    assert all(row["supervision_drift"] > 0.1 for row in later)
    assert [row["aligned"] for row in (first, *later)] == [1, 1, 1]
    asked = [row for row in rows["attempts"] if row["kind"] == "attempt"]
    assert len(asked) == 18
    for row in asked:
        assert row["text"].count("\n") >= 1
        assert not all(row["mask"])
    drifted = {
        row["prompt"].partition("/")[0]
        for row in rows["attempts"]
        if row["kind"] == "learned" and row["detail"]["freshness"]["supervision_drift"] > 0
    }
    assert drifted == {"shopping"}
