"""The parts of docs/extending.md, which live in examples/my_lab: each does what its page says, and all run together."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reflux
import tiny
from reflux.config import config_hash, from_table, load_recipe, to_table
from reflux.credit.base import share_credit
from reflux.objectives.base import Rows
from reflux.objectives.says import FullSays
from reflux.types import Attempt, Moment, SampledTarget, TeacherAnswer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PYTHONPATH=examples does for a user."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def part(dotted: str, **fields: Any) -> Any:
    from reflux.parts import load

    return load(f"my_lab.{dotted}")(**fields)


def test_surprise_keeps_what_the_teacher_would_hardly_say() -> None:
    rule = part("credit:Surprise", least_nats=1.0, elsewhere=0.25)
    heard, silent = Attempt(tiny.rollout(4, mask=[True, True, False, True])), Attempt(tiny.rollout(4, sample=1))
    heard.answers["main"] = TeacherAnswer(target=SampledTarget(teacher="main", logp_T=np.array([-0.1, -1.0, -0.1, -5.0], dtype=np.float32)))
    share_credit([[heard, silent]], {"surprise": rule}, Moment(0, 0))
    assert heard.weight_T.tolist() == [0.25, 1.0, 0.0, 1.0]
    assert np.asarray(heard.shares["surprise"].factor_T).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert heard.shares["surprise"].notes == {"surprising": pytest.approx(2 / 3)}
    assert silent.weight_T.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="elsewhere"):
        part("credit:Surprise", elsewhere=-1.0)


def test_jeffreys_is_half_the_sum_of_both_kls() -> None:
    dice = np.random.default_rng(0)
    student, teacher = dice.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    expected = 0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(-1)
    ids_N = torch.zeros(5, dtype=torch.int64)
    says = {name: FullSays(torch.from_numpy(logits), ids_N) for name, logits in (("student", student), ("main", teacher))}
    rows = Rows(says["student"], {"main": says["main"]}, torch.zeros(5), torch.zeros(5))
    np.testing.assert_allclose(part("objectives:Jeffreys")(rows).numpy(), expected, rtol=1e-12)


def test_backwards_grades_and_never_repeats_a_training_word_when_it_tests() -> None:
    task = part("tasks:Backwards", letters=3, held_out=50)
    trained = {prompt.answer for seed in (0, 1) for prompt in islice(task.prompts("train", seed), 500)}
    held_out = list(task.prompts("test", 0))
    assert len(held_out) == 50
    assert trained.isdisjoint(prompt.answer for prompt in held_out)
    assert list(islice(task.prompts("train", 0, 7), 3)) == list(islice(task.prompts("train", 0), 7, 10))
    prompt = held_out[0]
    assert task.verify(prompt, f"It is {prompt.answer}") == 1.0
    assert task.verify(prompt, "") == task.verify(prompt, prompt.answer[::-1] + "x") == 0.0


@pytest.mark.parametrize(("share", "expected"), [(0.0, {True}), (1.0, {False}), (0.5, {True, False})])
def test_mixed_takes_stored_answers_at_the_other_steps(tiny_run: Callable[..., Any], share: float, expected: set[bool]) -> None:
    """A step is stored or the student's own as a whole."""
    sampler = {"kind": "my_lab.samplers:Mixed", "share": share, "generate": {"kind": "hf", "max_tokens": 12}}
    done = tiny_run("full", sampler=sampler, task={"kind": "my_lab.tasks:Backwards"}, steps=5)
    seen = set()
    for step in range(1, 6):
        rows = [row for row in done.rows("attempts") if row["kind"] == "attempt" and row["step"] == step]
        stored = {not any(row["logp"]) for row in rows}  # nobody drew these tokens, so nobody gave them a probability
        assert len(rows) == 4
        assert len(stored) == 1
        if stored == {True}:
            assert all(row["text"] == row["question"].split()[1][::-1] for row in rows)
        seen |= stored
    assert seen == expected


def test_all_of_them_run_together_from_the_recipe(tmp_path: Path) -> None:
    recipe = EXAMPLES / "my_lab" / "recipe.toml"
    cfg = load_recipe(recipe)
    assert config_hash(from_table(to_table(cfg))) == config_hash(cfg)
    off = {f"evals.{name}": "none" for name in cfg.evals}
    summary = reflux.run(recipe, {"steps": 2, "prompts_per_step": 4, "threads": 1, "sampler.share": 1.0, **off}, out=tmp_path / "run")
    assert summary["method"] == "my_lab.objectives:Jeffreys + my_lab.credit:Surprise"
    metrics, attempts = (
        [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()] for name in ("metrics", "attempts")
    )
    learned = [row for row in attempts if row["kind"] == "learned" and row["step"] == 1]
    shares = [np.mean(np.array(row["teacher_logp"]["main"]) <= -0.5) for row in learned]
    assert metrics[0]["credit"]["surprise"]["surprising"] == pytest.approx(np.mean(shares))
    assert 0 < np.mean(shares) < 1
