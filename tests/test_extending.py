"""The parts of docs/extending.md, which live in examples/my_lab: each does what its page says, and all run together."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from reflux.config import config_hash, from_table, load_recipe, to_table
from reflux.credit.base import share_credit
from reflux.objectives.base import FullSays, Rows
from reflux.types import Attempt, Moment, SampledTarget

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
    heard.targets["main"] = SampledTarget(teacher="main", logp_T=np.array([-0.1, -1.0, -0.1, -5.0], dtype=np.float32))
    share_credit([[heard, silent]], {"surprise": rule}, Moment(0, 0))
    assert heard.weight_T.tolist() == [0.25, 1.0, 0.0, 1.0]
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
    rows = Rows(ids_N, says["student"], {"main": says["main"]}, torch.zeros(5), torch.zeros(5))
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


@pytest.mark.parametrize(("share", "own"), [(0.0, 0), (1.0, 3), (0.5, 1)])
def test_mixed_takes_stored_answers_at_the_other_steps(tiny_run: Callable[..., Any], share: float, own: int) -> None:
    """Which steps are the student's own follows from the seed alone."""
    sampler = {"kind": "my_lab.samplers:Mixed", "share": share, "generate": {"kind": "hf", "max_tokens": 12}}
    done = tiny_run("full", sampler=sampler, task={"kind": "my_lab.tasks:Backwards"})
    told = [row for row in done.rows("attempts") if row["kind"] == "attempt" and not any(row["logp"])]
    assert len(told) == 4 * (3 - own)
    assert all(row["text"] == row["question"].split()[1][::-1] for row in told)
    assert all(math.isfinite(row["loss"]) for row in done.rows("metrics"))


def test_all_of_them_run_together_from_the_recipe(tiny_run: Callable[..., Any]) -> None:
    recipe = str(EXAMPLES / "my_lab" / "recipe.toml")
    cfg = load_recipe(recipe)
    assert config_hash(from_table(to_table(cfg))) == config_hash(cfg)
    done = tiny_run(recipe, sampler={"kind": "my_lab.samplers:Mixed", "share": 1.0, "generate": {"kind": "hf", "max_tokens": 12}})
    assert done.summary["method"] == "my_lab.objectives:Jeffreys + my_lab.credit:Surprise"
    assert 0 < done.rows("metrics")[0]["credit"]["surprise"]["surprising"] < 1


def test_nothing_of_it_is_imported_by_the_library() -> None:
    assert not [name for name in sys.modules if name.startswith("reflux.") and "my_lab" in (getattr(sys.modules[name], "__file__", "") or "")]
