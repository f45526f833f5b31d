"""Law 9. Every rule has a setting at which it is the identity; with this setting the run equals the run
without the rule. A mask is equal to a cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.registry import kinds
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.credit.prefix import Prefix
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL
from tiny import attempt, close, gradients, rollout, same

PLAIN: dict[str, Any] = {
    "steps": 2,
    "task": {"kind": "outside:Chat"},
    "group_size": 2,
    "rewards": {"verifier": {}},
}
# a new rule adds its line here
NEUTRAL: dict[str, dict[str, Any]] = {
    "prefix": {"length": 12},
    "position": {"weight": 1.0},
    "group_advantage": {"nats": 0.0},
    "margin": {"delta": float("-inf")},
    "balance": {"ratio": "none"},
    "release": {"segments": 1, "min_segments": 100, "rescale": False},
    "freshness": {"alpha": 0.0, "beta": 0.0, "lag_power": 0.0, "floor": 0.0},
    "discrepancy": {"gamma": 0.0},
    "sign_gate": {"conflicting": 1.0},
    "unlikely": {"advantage": 0.0},
}

# the answers are short, so a change point is found wherever one is possible
RELEASE: dict[str, Any] = {"segments": 1, "min_segments": 2, "min_side": 1, "min_gain": -9.0}


def test_every_rule_has_a_neutral_setting() -> None:
    assert sorted(NEUTRAL) == sorted(kinds("credit"))


@pytest.mark.parametrize("loss_aggregation", ["token-mean-weighted", "token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("kind", sorted(NEUTRAL))
def test_a_neutral_rule_is_no_rule(tiny_run: Callable[..., Any], kind: str, loss_aggregation: str) -> None:
    settings = {**PLAIN, "loss_aggregation": loss_aggregation}
    assert same(
        tiny_run("opd", **settings).state, tiny_run("opd", **settings, credit={kind: NEUTRAL[kind]}).state
    )


ACTING: dict[str, dict[str, Any]] = {
    "prefix": {"length": 3},
    "position": {"weight": 0.5},
    "group_advantage": {"nats": 1.0},
    "margin": {"delta": 0.4},
    "balance": {"ratio": 0.0},
    "release": RELEASE,
    "freshness": {"floor": 0.3},
    "discrepancy": {"gamma": 0.5},
    "sign_gate": {},
    "unlikely": {},
}


@pytest.mark.parametrize(("kind", "table"), ACTING.items())
def test_other_settings_have_an_effect(
    tiny_run: Callable[..., Any], kind: str, table: dict[str, Any]
) -> None:
    settings = {**PLAIN, "loss_aggregation": "token-mean"}
    assert not same(
        tiny_run("opd", **settings).weights, tiny_run("opd", **settings, credit={kind: table}).weights
    )


def test_a_cap_at_or_above_the_longest_answer_is_no_cap(tiny_run: Callable[..., Any]) -> None:
    """Identity 1, for the length limit of the sampler."""
    whole = tiny_run("full", steps=2, task=PLAIN["task"], sampler__max_tokens=200)
    longest = max(len(row["tokens"]) for row in whole.rows("attempts") if row["kind"] == "attempt")
    assert longest < 200
    for cap in (longest, {"kind": "linear", "start": longest, "increment": 5}):
        assert same(
            whole.state,
            tiny_run(
                "full", steps=2, task=PLAIN["task"], sampler__max_tokens=200, sampler__train_max_tokens=cap
            ).state,
        )
    assert same(whole.state, tiny_run("full", steps=2, task=PLAIN["task"], sampler__max_tokens=longest).state)


@pytest.mark.parametrize(
    "objective", [Divergence(), SampledKL(baseline="kl"), Divergence(support="student", k=3)]
)
@pytest.mark.parametrize("length", [1, 4])
def test_a_mask_is_a_cut_where_kept_positions_are_counted(objective: Any, length: int) -> None:
    """Identity 3: equal under `kept`; under `chosen` they differ by exactly the ratio of the counts."""
    teacher = as_model(tiny.net(2).double(), character_tokenizer())
    whole = [[attempt(rollout(n, seed=n), teacher)] for n in (2, 7, 9)]
    cut = [[attempt(shorter(group[0].rollout, length), teacher)] for group in whole]
    share_credit(whole, {"prefix": Prefix(length)}, StepContext(0, 0))
    kept, chosen = sum(min(n, length) for n in (2, 7, 9)), 2 + 7 + 9
    for loss_aggregation, scale in (("token-mean-weighted", 1.0), ("token-mean", kept / chosen)):
        learner = tiny.learner(tiny.net(1).double())
        masked, short = (gradients(learner, groups, [objective], loss_aggregation) for groups in (whole, cut))
        close({name: gradient * scale for name, gradient in short.items()}, masked, rtol=1e-6)


def shorter(spoken: Any, length: int) -> Any:
    from dataclasses import replace

    parts = {name: getattr(spoken, name)[:length] for name in ("mask_T", "logp_T", "tokens_T")}
    return replace(spoken, **parts)


def test_what_comes_after_the_prefix_changes_no_gradient() -> None:
    """Identity 4: tokens and teacher values beyond it are never read."""
    teacher, other = (as_model(tiny.net(seed), character_tokenizer()) for seed in (2, 3))
    one = attempt(rollout(9, seed=1), teacher)
    changed = attempt(rollout(9, seed=1), teacher)
    changed.rollout.tokens_T[4:] = 50
    changed.rollout.logp_T[4:] = -30.0
    changed.target("main").h_TH[4:] = tiny.hidden(other, one.rollout).h_TH[4:]
    learner = tiny.learner(tiny.net(1))
    results = []
    for entry in (one, changed):
        share_credit([[entry]], {"prefix": Prefix(4)}, StepContext(0, 0))
        results.append(gradients(learner, [[entry]], [Divergence(), SampledKL()]))
    assert same(*results)


def test_the_cap_is_of_the_step_the_attempt_is_meant_for(tiny_run: Callable[..., Any]) -> None:
    """Identity 5: staleness does not change the cap, and all sampled positions are counted."""
    cap = {"kind": "linear", "start": 2, "increment": 1.5}
    for max_staleness in (0, 2):
        settings = {
            "task": PLAIN["task"],
            "sampler__train_max_tokens": cap,
            "max_staleness": max_staleness,
            "prompts_per_step": 8,
            "learner__lr": 1e-6,
        }
        done = tiny_run("full", steps=4, **settings)
        attempts = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
        cut = {(row["step"], len(row["tokens"])) for row in attempts if row["finish"] == "length"}
        assert cut == {(1, 2), (2, 3), (3, 5), (4, 6)}
        for row in done.rows("metrics"):
            assert row["tokens_sampled"] == sum(
                len(entry["tokens"]) for entry in attempts if entry["step"] == row["step"]
            )
