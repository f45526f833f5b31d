"""Law 5. Weights of credit rules multiply and offsets add, so any order of the rules gives the same run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.types import Attempt, Credit
from tiny import same

# three weights and three offsets at one position, because two commute exactly in floating point
RULES = {
    "prefix": {"kind": "prefix", "length": 6},
    "position": {"kind": "position", "weight": {"kind": "linear", "start": 1.0, "stop": 0.3, "horizon": 7}},
    "half": {"kind": "outside:Half", "factor": 0.7},
    "third": {"kind": "outside:Half", "factor": 0.3},
    "release": {
        "kind": "release",
        "segments": 1,
        "min_segments": 2,
        "min_side": 1,
        "min_gain": -9.0,
        "rescale": False,
    },
    "group_advantage": {"kind": "group_advantage", "nats": 0.3},
    "more": {"kind": "group_advantage", "nats": 0.11},
    "again": {"kind": "group_advantage", "nats": 0.37, "normalise_std": True},
    "margin": {"kind": "margin", "delta": 0.7},
    "balance": {"kind": "balance", "ratio": 0.5},
    "freshness": {"kind": "freshness", "floor": 0.3},
    "discrepancy": {"kind": "discrepancy", "gamma": 0.7},
    "sign_gate": {"kind": "sign_gate", "conflicting": 0.3},
    "unlikely": {"kind": "unlikely", "advantage": -0.13},
}
# freshness refuses the default, which does not count positions of weight 0
TOKEN_MEAN = {"loss_aggregation": "token-mean"}


def test_any_order_of_the_rules_gives_the_same_bits(tiny_run: Callable[..., Any]) -> None:
    settings = {"steps": 2, "group_size": 3, "task": {"kind": "outside:Chat"}, **TOKEN_MEAN}
    rng, rules = random.Random(0), list(RULES.items())
    orders = [rules, rules[::-1], *(rng.sample(rules, len(rules)) for _ in range(3))]
    runs = [tiny_run("rl_opd", **settings, credit=dict(order)) for order in orders]
    assert all(same(runs[0].state, other.state) for other in runs[1:])
    plain = tiny_run("rl_opd", **settings, credit={"group_advantage": RULES["group_advantage"]})
    # the rules have an effect
    assert not same(runs[0].weights, plain.weights)


def test_each_rule_is_logged_under_its_name(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run(
        "rl_opd", steps=1, group_size=2, task={"kind": "outside:Chat"}, credit=RULES, **TOKEN_MEAN
    )
    assert set(done.rows("metrics")[0]["credit"]) == set(RULES)
    assert done.rows("metrics")[0]["credit"]["half"]["weight_mean"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "share",
    [
        Credit(weight_T=-0.1),
        Credit(weight_T=float("inf")),
        Credit(weight_T=float("nan")),
        Credit(advantage_offset_T=np.inf),
    ],
)
def test_a_weight_that_is_negative_or_not_finite_is_refused(share: Credit) -> None:
    from tiny import rollout

    with pytest.raises(ValueError, match=r"credit\.bad gave prompt p0"):
        share_credit([[Attempt(rollout(3))]], {"bad": lambda group, step_context: [share]}, StepContext(0, 0))  # type: ignore[dict-item]


def test_a_rule_without_one_credit_per_attempt_is_refused() -> None:
    from tiny import rollout

    with pytest.raises(ValueError, match="1 credits for a group of 2"):
        share_credit(
            [[Attempt(rollout(3)), Attempt(rollout(2))]],
            {"bad": lambda group, step_context: [Credit()]},
            StepContext(0, 0),
        )  # type: ignore[dict-item]
