"""What targets answer for themselves: one way from each kind of target to log-probs, rows and divergences."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tiny_flow
from reflux.assets.characters import character_tokenizer
from reflux.errors import ModelError
from reflux.kernels.head import Head
from reflux.loss.outputs import SampledLogprobs, TopKLogprobs
from reflux.models.heads import Heads
from reflux.models.text import as_model
from reflux.types import HiddenTarget, SampledTarget, TopKTarget, VelocityTarget
from tiny_flow import velocities

T, H, V = 5, 4, 9
DICE = np.random.default_rng(0)
SPOKEN = tiny.rollout(T, seed=1)
TOKENS_T = np.asarray(SPOKEN.tokens_T) % V


def spoken() -> Any:
    from dataclasses import replace

    return replace(SPOKEN, tokens_T=TOKENS_T)


class Two:
    """Two models with heads of their own, and what each says in float64, by hand."""

    def __init__(self) -> None:
        self.heads = Heads()
        self.logp, self.targets = [], []
        for number, scale in enumerate((1.0, 0.5)):
            weight_VH = torch.from_numpy(DICE.normal(size=(V, H)).astype(np.float32))
            h_TH = torch.from_numpy(DICE.normal(size=(T, H)).astype(np.float32))
            key = self.heads.add(f"teachers.{number}", Head.of(weight_VH, scale=scale))
            logits_TV = scale * h_TH.double() @ weight_VH.double().T
            self.logp.append((logits_TV - logits_TV.logsumexp(-1, keepdim=True)).numpy())
            self.targets.append(HiddenTarget(teacher=f"{number}", h_TH=h_TH, head=key))

    def listed(self, number: int, k: int = 3) -> TopKTarget:
        logp_TV = self.logp[number]
        ids_TK = np.argsort(-logp_TV, axis=1)[:, :k]
        logp_T = logp_TV[range(T), TOKENS_T]
        return TopKTarget(
            teacher="l", ids_TK=ids_TK, logp_TK=np.take_along_axis(logp_TV, ids_TK, 1), logp_T=logp_T
        )

    def sampled(self, number: int) -> SampledTarget:
        return SampledTarget(teacher="s", logp_T=self.logp[number][range(T), TOKENS_T])


TWO = Two()


def every(number: int) -> list[Any]:
    return [TWO.targets[number], TWO.listed(number), TWO.sampled(number)]


@pytest.mark.parametrize("kind", range(3))
def test_the_log_probs_of_the_sampled_tokens_from_any_target(kind: int) -> None:
    expected = TWO.logp[0][range(T), TOKENS_T]
    np.testing.assert_allclose(every(0)[kind].sampled_logp_T(spoken(), TWO.heads), expected, atol=1e-5)


def test_what_was_asked_for_at_scoring_time_is_not_computed_again() -> None:
    known = HiddenTarget(teacher="x", h_TH=torch.zeros(T, H), head="closed", logp_T=np.arange(T))
    assert known.sampled_logp_T(spoken(), Heads()) is known.logp_T


def test_log_probs_at_given_ids_are_the_heads() -> None:
    ids_TK = DICE.integers(0, V, (T, 4))
    np.testing.assert_allclose(
        TWO.targets[1].logp_at(ids_TK, TWO.heads), np.take_along_axis(TWO.logp[1], ids_TK, 1), atol=1e-5
    )
    whole = TWO.listed(1, V)
    np.testing.assert_allclose(
        whole.logp_at(ids_TK, TWO.heads), np.take_along_axis(TWO.logp[1], ids_TK, 1), atol=1e-12
    )


def test_the_kl_of_two_models_known_in_full_is_exact_and_else_the_sampled_estimate() -> None:
    p, q = np.exp(TWO.logp[0]), np.exp(TWO.logp[1])
    exact = (p * (np.log(p) - np.log(q))).sum(1)
    np.testing.assert_allclose(TWO.targets[0].kl_T(TWO.targets[1], spoken(), TWO.heads), exact, atol=1e-5)
    np.testing.assert_allclose(
        TWO.targets[0].kl_T(TWO.targets[0], spoken(), TWO.heads), np.zeros(T), atol=1e-6
    )
    estimate = (TWO.logp[0] - TWO.logp[1])[range(T), TOKENS_T]
    for i, one in enumerate(every(0)):
        for j, other in enumerate(every(1)):
            if i or j:
                np.testing.assert_allclose(one.kl_T(other, spoken(), TWO.heads), estimate, atol=1e-5)


def test_a_long_attempt_goes_through_the_heads_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from reflux.kernels import head

    expected = TWO.targets[0].kl_T(TWO.targets[1], spoken(), TWO.heads)
    monkeypatch.setattr(head, "chunk_rows", lambda *_: 2)
    np.testing.assert_allclose(TWO.targets[0].kl_T(TWO.targets[1], spoken(), TWO.heads), expected, atol=1e-6)


def test_what_both_models_rule_out_costs_nothing() -> None:
    heads = Heads()
    key = heads.add("k", Head.of(torch.eye(V), bias_V=torch.tensor([0.0] * (V - 1) + [-torch.inf])))
    one, other = (HiddenTarget(teacher="x", h_TH=torch.ones(T, V) * shift, head=key) for shift in (1.0, 2.0))
    np.testing.assert_allclose(one.kl_T(other, spoken(), heads), np.zeros(T), atol=1e-6)


def test_uniformity_is_the_entropy_over_its_largest() -> None:
    p = np.exp(TWO.logp[0])
    expected = float(-(p * np.log(p)).sum(1).mean() / np.log(V))
    assert TWO.targets[0].uniformity(TWO.heads) == pytest.approx(expected, abs=1e-5)
    flat = HiddenTarget(teacher="x", h_TH=torch.zeros(T, H), head="teachers.0")
    assert flat.uniformity(TWO.heads) == pytest.approx(1.0)
    assert [target.uniformity(TWO.heads) for target in every(0)[1:]] == [None, None]


def test_rows_are_what_is_known_at_the_kept_positions() -> None:
    rows_N = np.array([0, 2, 4])
    assert {name: column.shape for name, column in TWO.targets[0].rows(rows_N).items()} == {"h_NH": (3, H)}
    assert torch.equal(TWO.targets[0].rows(rows_N)["h_NH"], TWO.targets[0].h_TH[[0, 2, 4]])
    listed = TWO.listed(0)
    outputs = listed.outputs(listed.rows(rows_N))
    assert isinstance(outputs, TopKLogprobs)
    assert outputs.ids_NK.tolist() == listed.ids_TK[rows_N].tolist()
    assert outputs.logp_NK.tolist() == listed.logp_TK[rows_N].tolist()
    assert outputs.logp_N.tolist() == listed.logp_T[rows_N].tolist()
    sampled = TWO.sampled(0)
    assert isinstance(sampled.outputs(sampled.rows(rows_N)), SampledLogprobs)
    with pytest.raises(ValueError, match="the rows of a HiddenTarget give no outputs without a head"):
        TWO.targets[0].outputs(TWO.targets[0].rows(rows_N))


def test_only_targets_of_one_kind_one_head_and_one_width_share_a_micro_batch() -> None:
    kinds = [
        *every(0),
        TWO.targets[1],
        TWO.listed(0, 4),
        velocities(tiny_flow.model(1), tiny_flow.rollout(2)),
    ]
    assert len({target.signature for target in kinds}) == len(kinds)
    assert TWO.listed(0).signature == TWO.listed(1).signature
    assert [target.head_key for target in kinds] == ["teachers.0", None, None, "teachers.1", None, None]


def test_velocities_have_a_kl_of_their_own_and_no_log_probs() -> None:
    drawn = tiny_flow.rollout(3, noise_level=0.7)
    one, other = (velocities(tiny_flow.model(seed), drawn) for seed in (1, 2))
    kl_T = one.kl_T(other, drawn, Heads())
    assert kl_T is not None
    assert (kl_T[drawn.mask_T] > 0).all()
    assert one.kl_T(other, tiny_flow.rollout(3, noise_level=0.0), Heads()) is None
    assert one.kl_T(TWO.sampled(0), drawn, Heads()) is None
    assert TWO.sampled(0).kl_T(one, spoken(), Heads()) is None
    assert (one.logp_T, one.sampled_logp_T(drawn, Heads())) == (None, None)
    with pytest.raises(ValueError, match="a VelocityTarget has none"):
        one.logp_at(np.zeros((3, 1), np.int64), Heads())


def test_a_head_is_found_only_where_its_teacher_is_open() -> None:
    heads = Heads()
    one, other = Head.of(torch.eye(2)), Head.of(torch.eye(2))
    assert heads.add("teachers.main", one) == heads.add("teachers.main", one) == "teachers.main"
    with pytest.raises(ValueError, match=r"already registered under the key 'teachers\.main'"):
        heads.add("teachers.main", other)
    assert heads["teachers.main"] is one
    with pytest.raises(
        ModelError,
        match=(
            r"needs the output head 'gone', but this process has no head of that name "
            r"\(it has: teachers\.main\)"
        ),
    ):
        heads["gone"]
    heads.remove("teachers.main")
    heads.remove("teachers.main")
    with pytest.raises(ModelError, match="it has: none"):
        heads["teachers.main"]


@pytest.mark.parametrize("target", [*every(0), VelocityTarget(teacher="v", v_TD=np.ones((2, 3), np.float32))])
def test_targets_survive_a_pickle_and_hold_no_model(target: Any) -> None:
    data = pickle.dumps(target)
    again = pickle.loads(data)
    assert again.signature == target.signature
    assert len(data) < 2000
    for name, column in target.rows(np.array([0, 1])).items():
        assert torch.equal(again.rows(np.array([0, 1]))[name], column)


def test_a_closed_teacher_takes_its_head_back(teacher: str) -> None:
    import asyncio

    from reflux.teachers.local import Local

    services = tiny.services()
    services.heads = heads = Heads()

    async def act() -> None:
        async with Local(teacher, dtype="float32").open(tiny.context(), services) as opened:
            assert heads["teachers.main"] is opened.model.head

    asyncio.run(act())
    with pytest.raises(ModelError, match="it has: none"):
        heads["teachers.main"]


def test_hidden_states_of_a_real_model_give_what_its_logits_give() -> None:
    model = as_model(tiny.net(2), character_tokenizer())
    target = tiny.hidden(model, SPOKEN)
    logp_TV = model.head.logits(target.h_TH).log_softmax(-1).detach().cpu()
    found = target.sampled_logp_T(SPOKEN, tiny.HEADS)
    np.testing.assert_allclose(found, logp_TV[range(T), SPOKEN.tokens_T], atol=1e-5)
