"""Six methods in one run act as they do alone: the credit of each rule for an attempt does not depend on the
other parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reflux import checks
from reflux.config.recipe import load_recipe
from reflux.config.registry import kind_of

CHAT = {"kind": "outside:Chat"}
RULES: dict[str, dict[str, Any]] = {
    "margin": {"delta": 0.4},
    "balance": {"ratio": 1.0},
    "prefix": {"length": 7},
}
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "group_size": 6,
    "prompts_per_step": 3,
    "task": CHAT,
    "sampler__max_tokens": 14,
}


def lines(done: Any) -> dict[tuple[int, str, int], dict[str, Any]]:
    """The second line of every attempt, by (step, prompt, sample)."""
    return {
        (row["step"], row["prompt"], row["sample"]): row
        for row in done.rows("attempts")
        if row["kind"] == "learned"
    }


@pytest.fixture
def everything(tiny_run: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe at tiny scale with some of its rules. Extrapolation does not start, so that every run has
    the same attempts in step 1.
    """

    def run(*rules: str, **overrides: Any) -> Any:
        credit = {name: RULES[name] if name in rules else "none" for name in RULES}
        return tiny_run("everything", **{**SETTINGS, "credit": credit, "extrapolation": "none", **overrides})

    return run


def test_the_recipe_holds_all_six() -> None:
    cfg = load_recipe("everything")
    checks.join(cfg)
    (objective,) = cfg.objectives
    assert (kind_of("objectives", objective), objective.baseline) == ("sampled_kl", "kl")
    assert {kind_of("credit", rule) for rule in cfg.credit.values()} == {"margin", "balance", "prefix"}
    assert [kind_of("contexts", teacher.context) for teacher in cfg.teachers.values()] == ["peers"]
    assert kind_of("extrapolation", cfg.extrapolation) == "extrapolate"
    assert cfg.loss_aggregation == "seq-mean-token-mean"
    assert checks.warnings(cfg) == []


def test_weights_multiply_and_offsets_add_as_each_rule_alone_gave_them(
    everything: Callable[..., Any],
) -> None:
    together = lines(everything(*RULES))
    alone = {name: lines(everything(name)) for name in RULES}
    plain = lines(everything())
    effects = dict.fromkeys(RULES, 0)
    for key, line in together.items():
        if key[0] > 1:
            # the students differ after step 1
            continue
        weight_T = np.asarray(plain[key]["weight"])
        advantage_offset_T = np.zeros(len(weight_T))
        for name, found in alone.items():
            of_rule_T = np.asarray(found[key]["weight"])
            offset_T = np.asarray(found[key].get("advantage_offset", np.zeros(len(weight_T))))
            effects[name] += int((of_rule_T != weight_T).any() or offset_T.any())
            advantage_offset_T = advantage_offset_T + offset_T
        for found in alone.values():
            # weights without rules are masks: 0 or 1
            weight_T = weight_T * np.asarray(found[key]["weight"])
        assert np.array_equal(line["weight"], weight_T)
        assert np.allclose(
            line.get("advantage_offset", np.zeros(len(weight_T))), advantage_offset_T, atol=1e-5
        )
    # each rule had an effect, or this would test nothing
    assert all(effects.values()), effects


def test_the_order_in_which_rules_are_written_changes_no_bit(everything: Callable[..., Any]) -> None:
    orders = [
        ("margin", "balance", "prefix"),
        ("prefix", "margin", "balance"),
        ("balance", "prefix", "margin"),
    ]
    states = [everything(*order).weights for order in orders]
    for other in states[1:]:
        assert all(bool((states[0][name] == other[name]).all()) for name in states[0])


def test_each_of_the_six_changes_the_run(everything: Callable[..., Any]) -> None:
    whole = everything(*RULES).weights

    def same(other: Any) -> bool:
        return all(bool((whole[name] == other.weights[name]).all()) for name in whole)

    assert same(everything(*RULES))
    for left_out in RULES:
        assert not same(everything(*(name for name in RULES if name != left_out))), left_out
    assert not same(everything(*RULES, objectives=[{"kind": "sampled_kl", "max_gap_nats": 10}]))
    assert not same(everything(*RULES, teachers__main__context={"kind": "same"}))
    jumping = {"kind": "extrapolate", "tries": 1, "accept": "not_worse", "prompts": 2}
    assert not same(everything(*RULES, extrapolation=jumping, task={**CHAT, "replies": 0}))


def test_group_statistics_do_not_see_how_the_batch_is_cut(everything: Callable[..., Any]) -> None:
    """With one attempt per micro-batch or all in one, offsets, weights and the step are those of whole
    groups.
    """
    settings = {"steps": 1, "learner__lr": 1e-2, "learner__min_grad_norm": 0.0}
    runs = [everything(*RULES, **settings, learner__micro_batch_tokens=tokens) for tokens in (1, 100_000)]
    first, second = (lines(done) for done in runs)
    assert all(
        first[key]["weight"] == line["weight"]
        and first[key].get("advantage_offset") == line.get("advantage_offset")
        for key, line in second.items()
    )
    norms = [done.rows("metrics")[0]["grad_norm"] for done in runs]
    losses = [done.rows("metrics")[0]["loss"] for done in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
