"""Law 3. Weight 0, a missing target, a missing reward and padding give exactly no gradient, whatever they
would cost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.registry import kinds, part
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.kernels.head import Head
from reflux.loss import token_loss
from reflux.loss.batch import plan
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, HiddenTarget, Reward, TeacherAnswer, TokenRollout
from tiny import attempt, gradients, rollout, same

TOKENS = 102
OBJECTIVES = [
    Divergence(), Divergence(divergence="forward"), Divergence(support="student", k=4), SampledKL(),
    SampledKL(baseline="kl"), SampledKL(baseline="topk_kl"), SampledKL(ratio="clip"),
    SampledKL(baseline="minimum_variance"),
    Divergence(support="union", k=4),
    Divergence(support="teacher", k=4, tail="renormalised"), Divergence(ratio="truncated"),
]  # fmt: skip
IDS = [f"{type(o).__name__}-{i}" for i, o in enumerate(OBJECTIVES)]


def logits_target(spoken: TokenRollout, at: dict[int, float]) -> HiddenTarget:
    """A teacher whose hidden state is its logits; `at`: the sampled token's logit at these positions."""
    logits_TV = torch.randn(spoken.length, TOKENS, generator=torch.Generator().manual_seed(5))
    for position, value in at.items():
        logits_TV[position, spoken.tokens_T[position]] = value
    return HiddenTarget(teacher="main", h_TH=logits_TV, head=tiny.HEADS.add("logits", HEAD))


# "hidden states" that are the logits: products would turn an infinite one into NaN
HEAD = Head(nn.Identity, TOKENS)


def groups(mute: float, silent_value: float) -> list[list[Attempt]]:
    """Two attempts; positions 1 and 4 of the first weigh `mute`, and there the teacher gives the sampled
    token logit `silent_value`.
    """
    first = attempt(rollout(6, seed=1), weight=[1, mute, 0.5, 1, mute, 1])
    first.answers["main"] = TeacherAnswer(
        target=logits_target(first.rollout, {1: silent_value, 4: silent_value})
    )
    second = attempt(rollout(4, seed=2))
    second.answers["main"] = TeacherAnswer(target=logits_target(second.rollout, {}))
    return [[first], [second]]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_weight_zero_is_exactly_silent_also_where_the_cost_is_infinite(objective: Any) -> None:
    learner = tiny.learner(tiny.net(1))
    ruled_out, finite = (gradients(learner, groups(0.0, value), [objective]) for value in (-torch.inf, 1.0))
    assert same(ruled_out, finite)
    assert all(gradient.isfinite().all() for gradient in ruled_out.values())
    assert any(gradient.abs().sum() > 0 for gradient in ruled_out.values())


def test_the_same_infinity_at_a_position_with_weight_is_refused() -> None:
    from reflux.errors import StepRefused

    with pytest.raises(StepRefused, match=r"the loss is -inf .* no weight has changed"):
        gradients(tiny.learner(tiny.net(1)), groups(1.0, -torch.inf), [SampledKL(ratio="none")])


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, NLL(), PolicyGradient()], ids=[*IDS, "NLL", "PolicyGradient"]
)
def test_only_zero_weights_no_step(objective: Any) -> None:
    learner = tiny.learner(tiny.net(1), lr=1.0)
    before = {name: value.clone() for name, value in learner.trained.items()}
    teacher = as_model(tiny.net(2), character_tokenizer())
    silent = [[attempt(rollout(5, seed=i), teacher, weight=0.0, shift=1.0)] for i in range(3)]
    assert gradients(learner, silent, [objective]) == {}
    assert learner.version == 0
    assert same(before, dict(learner.trained))


@pytest.mark.parametrize("loss_aggregation", ["token-mean-weighted", "seq-mean-token-mean"])
def test_a_missing_target_is_silent(loss_aggregation: str) -> None:
    """Under `kept` the silent attempt is not counted; under `seq-mean-token-mean` it is one of R."""
    teacher = as_model(tiny.net(2), character_tokenizer())
    spoken = [attempt(rollout(n, seed=n), teacher) for n in (3, 5, 7)]
    learner = tiny.learner(tiny.net(1))
    alone = gradients(learner, [spoken], [Divergence()], loss_aggregation)
    with_silent = gradients(
        learner, [spoken, [attempt(rollout(9, seed=9))]], [Divergence()], loss_aggregation
    )
    scale = 1.0 if loss_aggregation == "token-mean-weighted" else 3 / 4
    for name, gradient in alone.items():
        torch.testing.assert_close(
            with_silent[name], gradient * scale, rtol=0, atol=1e-6 if scale != 1 else 0
        )


def test_a_missing_target_silences_its_objective_only() -> None:
    teacher = as_model(tiny.net(2), character_tokenizer())
    spoken, silent = attempt(rollout(4, seed=1), teacher), attempt(rollout(4, seed=2))
    learner = tiny.learner(tiny.net(1), micro_batch_tokens=1)
    both = gradients(learner, [[spoken], [silent]], [Divergence(), NLL()])
    one, other = (
        gradients(learner, [[spoken], [silent]], [objective]) for objective in (Divergence(), NLL())
    )
    for name in both:
        torch.testing.assert_close(both[name], one[name] + other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_siblings_that_failed_or_were_not_scored_leave_the_value_of_the_others(baseline: str) -> None:
    """And the value is used: without it the gradient is another one."""
    group = [attempt(rollout(n, seed=1, sample=i)) for i, n in enumerate((4, 6, 3, 5))]
    group[3] = attempt(rollout(5, seed=1, sample=3, finish="error"))
    for i in (0, 1, 3):
        target, tokens_T = logits_target(group[i].rollout, {}), torch.from_numpy(group[i].rollout.tokens_T)
        logp_T = target.h_TH.log_softmax(-1).gather(-1, tokens_T[:, None])[:, 0].numpy()
        group[i].answers["main"] = TeacherAnswer(target=dataclasses.replace(target, logp_T=logp_T))
    learner, objective = tiny.learner(tiny.net(1)), SampledKL(baseline=baseline)
    all_four, alone = (gradients(learner, [members], [objective]) for members in (group, group[:2]))
    assert same(all_four, alone)
    assert not same(alone, gradients(learner, [group[:2]], [SampledKL()]))
    # nobody to compare with
    assert same(gradients(learner, [group[:1]], [objective]), gradients(learner, [group[:1]], [SampledKL()]))


def test_a_missing_reward_is_silent() -> None:
    """Not judged is not wrong: the siblings' mean is theirs alone, and the attempt gives no gradient."""
    from reflux.credit.group_advantage import GroupAdvantage

    judged = [
        attempt(rollout(4, seed=1, sample=0)),
        attempt(rollout(5, seed=1, sample=1)),
        attempt(rollout(6, seed=1, sample=2)),
    ]
    judged[0].reward, judged[1].reward, judged[2].reward = Reward(1.0), Reward(0.0), Reward(None)
    learner = tiny.learner(tiny.net(1))
    results = []
    for group in (judged, judged[:2]):
        share_credit([group], {"group_advantage": GroupAdvantage()}, StepContext(0, 0))
        results.append(gradients(learner, [group], [PolicyGradient()]))
    assert same(*results)
    assert any(gradient.abs().sum() > 0 for gradient in results[0].values())


def test_a_group_without_any_reward_makes_no_step() -> None:
    learner = tiny.learner(tiny.net(1))
    assert (
        gradients(
            learner,
            [[attempt(rollout(4, seed=1)), attempt(rollout(5, seed=1, sample=1))]],
            [PolicyGradient()],
        )
        == {}
    )
    assert learner.version == 0


def test_padding_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = as_model(tiny.net(2), character_tokenizer())
    batch = [[attempt(rollout(n, seed=n, prompt_tokens=2 + n), teacher)] for n in (2, 9, 5)]
    learner = tiny.learner(tiny.net(1))
    zeros = gradients(learner, batch, [Divergence()])
    monkeypatch.setattr(
        token_loss, "TokenMicroBatch", functools.partial(token_loss.TokenMicroBatch, pad_id=77)
    )
    assert same(zeros, gradients(learner, batch, [Divergence()]))


@pytest.mark.parametrize("loss_aggregation", ["token-mean-weighted", "token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("finish", ["stop", "error"])
def test_empty_replies_and_errors_count_nowhere(loss_aggregation: str, finish: str) -> None:
    teacher = as_model(tiny.net(2), character_tokenizer())
    spoken = [attempt(rollout(n, seed=n), teacher) for n in (3, 6)]
    nothing = (
        attempt(rollout(0, seed=8))
        if finish == "stop"
        else attempt(rollout(7, seed=8, finish="error"), teacher)
    )
    learner = tiny.learner(tiny.net(1))
    assert same(
        *(
            gradients(learner, [spoken, extra], [Divergence(), NLL()], loss_aggregation)
            for extra in ([], [nothing])
        )
    )


def test_an_attempt_that_chose_nothing_counts_nowhere() -> None:
    teacher = as_model(tiny.net(2), character_tokenizer())
    spoken = [attempt(rollout(n, seed=n), teacher) for n in (3, 6)]
    objective_teachers = attempt(rollout(5, seed=3, mask=[False] * 5), teacher)
    for loss_aggregation in ("token-mean-weighted", "token-mean", "seq-mean-token-mean"):
        learner = tiny.learner(tiny.net(1))
        assert same(
            *(
                gradients(learner, [spoken, extra], [Divergence()], loss_aggregation)
                for extra in ([], [objective_teachers])
            )
        )


@pytest.mark.parametrize("kind", sorted(kinds("credit")))
def test_every_credit_rule_bears_empty_and_failed_attempts(kind: str) -> None:
    required = {"prefix": {"length": 3}, "position": {"weight": 0.5}}.get(kind, {})
    rule = part("credit", kind)(**required)
    group = [
        attempt(rollout(0, seed=1)),
        attempt(rollout(4, seed=1, sample=1, finish="error")),
        attempt(rollout(3, seed=1, sample=2)),
    ]
    for entry, value in zip(group, (0.0, None, 1.0), strict=True):
        entry.reward = Reward(value)
    share_credit([group], {kind: rule}, StepContext(0, 0))
    assert [len(entry.weight_T) for entry in group] == [0, 4, 3]
    assert not group[1].weight_T.any()
    assert np.isfinite(group[2].advantage_offset_T).all()


def test_a_whole_run_of_failed_attempts_changes_nothing(tiny_run: Callable[..., Any]) -> None:
    """Prompts longer than the limit are skipped: counted, listed, never trained on."""
    overrides = {"sampler__max_prompt_tokens": 3, "sampler__long_prompts": "skip", "steps": 2}
    done = tiny_run("opd", **overrides)
    assert [row["errors"] for row in done.rows("metrics")] == [4, 4]
    assert [row["tokens_sampled"] for row in done.rows("metrics")] == [0, 0]
    assert {row["finish"] for row in done.rows("attempts") if row["kind"] == "attempt"} == {"error"}
    assert done.state["version"] == 0
    assert plan([], [Divergence()], "token-mean-weighted") == []
