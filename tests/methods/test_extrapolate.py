"""EffOPD against its page: when it fires, what it tries, what it keeps, and that everything else stays bit
for bit.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from reflux.errors import ConfigError, RefluxError, RunError
from reflux.extrapolation.extrapolate import Extrapolate, fires, multiples
from reflux.extrapolation.extrapolate_engine import OpenExtrapolate
from reflux.learners.access import moved
from reflux.metrics.flops import Spent, Work
from reflux.models.settings import Lora
from reflux.objectives.divergence import Divergence
from reflux.storage import files
from tiny import same

# --- when, and how far


def test_it_fires_after_powers_of_two() -> None:
    assert [step for step in range(1100) if fires(step)] == [2**n for n in range(11)]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        fires(-1)


def test_multiples_are_the_released_codes_chained_factors() -> None:
    factors = [Fraction(2)]
    while len(factors) < 30:
        factors.append(factors[-1] / (1 + factors[-1]))
    assert factors[:5] == [2, Fraction(2, 3), Fraction(2, 5), Fraction(2, 7), Fraction(2, 9)]
    reached = [product - 1 for product in accumulate((1 + factor for factor in factors), lambda a, b: a * b)]
    assert multiples() == multiples(5) == [2, 4, 6, 8, 10] == reached[:5]
    assert multiples(30) == reached
    assert multiples(0) == []
    with pytest.raises(ValueError, match="at least 0, got -1"):
        multiples(-1)


def test_what_moves_is_attention_and_mlp_without_norms() -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.q_proj.bias": True,
        "model.layers.0.self_attn.q_norm.weight": False,
        "model.layers.0.post_attention_layernorm.weight": False,
        "model.layers.11.mlp.down_proj.weight": True,
        "transformer.h.3.attn.c_attn.weight": True,
        "gpt_neox.layers.0.attention.dense.weight": True,
        "model.embed_tokens.weight": False,
        "model.norm.weight": False,
        "lm_head.weight": False,
    }
    assert moved(names, Extrapolate().include) == [name for name, moves in names.items() if moves]
    assert moved(names, ["q_norm"]) == ["model.layers.0.self_attn.q_norm.weight"]
    assert moved(names, ["nothing"]) == []


# --- a student that is one vector, and scores made up


class Line:
    """A learner whose weights are float64 vectors."""

    def __init__(self, **values: Any):
        self.values = {
            name.replace("__", "."): torch.tensor(value, dtype=torch.float64)
            for name, value in values.items()
        }
        self.names = list(self.values)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.values[name].clone() for name in names}

    base = read

    def write(self, base: Mapping[str, Tensor]) -> None:
        for name, value in base.items():
            self.values[name] = value.clone()


class Noted:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def opened(folder: Path, **fields: Any) -> OpenExtrapolate:
    services = tiny.services(
        listener=Noted(), append=lambda name, row: files.append_lines(folder / name, [dict(row)])
    )
    return OpenExtrapolate(Extrapolate(**fields), tiny.context(name="extrapolation"), services)


def searches(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "searches.jsonl").read_text().splitlines()]


def scripted(learner: Line, scores: list[float]) -> tuple[Callable[..., Any], list[tuple[float, int]]]:
    """Scores in order of being asked, and (first weight, random numbers) of each question."""
    given, asked = iter(scores), []

    async def score(rng: int = 0) -> float:
        asked.append((float(learner.values["mlp.w"][0]), rng))
        return next(given)

    score.spent = Spent(Work(sampled=7))  # type: ignore[attr-defined]

    return score, asked


def one_search(
    folder: Path, scores: list[float], **fields: Any
) -> tuple[Line, list[tuple[float, int]], bool]:
    """One update from 1 to 1.25, then the search: candidates lie at 1.25 + m / 4."""
    learner, extrapolation = Line(mlp__w=[1.0], other=[5.0]), opened(folder, **fields)
    extrapolation.start(learner)
    learner.write(
        {
            "mlp.w": torch.tensor([1.25], dtype=torch.float64),
            "other": torch.tensor([6.0], dtype=torch.float64),
        }
    )
    score, asked = scripted(learner, scores)
    jumped = asyncio.run(extrapolation.after_step(learner, score, 1))
    return learner, asked, jumped


@pytest.mark.parametrize(
    ("scores", "accepted"),
    [
        ([0.5, 0.4], 0),
        ([0.5, 0.5], 0),
        ([0.5, 0.6, 0.6], 2),
        ([0.5, 0.6, 0.7, 0.65], 4),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 10),
        ([-0.3, -0.2, -0.25], 2),
        ([0.5, math.nan], 0),
        ([0.5, 0.6, math.inf], 2),
        ([0.5, -math.inf], 0),
    ],
)
def test_the_last_candidate_that_scored_better_is_kept(
    tmp_path: Path, scores: list[float], accepted: int
) -> None:
    learner, asked, jumped = one_search(tmp_path, scores)
    assert learner.values["mlp.w"].tolist() == [1.25 + accepted * 0.25]
    assert learner.values["other"].tolist() == [6.0]
    assert jumped == (accepted > 0)
    # candidates share their random numbers
    assert asked == [(1.25 + m * 0.25, 0) for m in [0, 2, 4, 6, 8, 10][: len(scores)]]
    (row,) = searches(tmp_path)
    plain = [None if not math.isfinite(score) else score for score in scores]
    assert (row["step"], row["here"], row["accepted"], row["tokens"], row["delta_norm"]) == (
        1,
        scores[0],
        accepted,
        7,
        0.25,
    )
    assert [(trial["multiple"], trial["score"]) for trial in row["tried"]] == list(
        zip([2, 4, 6, 8, 10], plain[1:], strict=False)
    )
    assert row["seconds"] >= 0


def test_a_rejection_gives_back_every_bit_even_a_signed_zero(tmp_path: Path) -> None:
    extrapolation, learner = opened(tmp_path), Line(mlp__w=[-1.0, 1.0])
    extrapolation.start(learner)
    learner.write({"mlp.w": torch.tensor([-0.0, 1.1], dtype=torch.float64)})
    before = learner.values["mlp.w"].numpy().tobytes()
    assert not asyncio.run(extrapolation.after_step(learner, scripted(learner, [0.5, 0.1])[0], 1))
    assert learner.values["mlp.w"].numpy().tobytes() == before


def test_ties_pass_where_not_worse_is_enough(tmp_path: Path) -> None:
    learner, _, _ = one_search(tmp_path, [0.5, 0.5, 0.5, 0.4], accept="not_worse")
    assert learner.values["mlp.w"].tolist() == [1.25 + 4 * 0.25]


def test_a_score_that_is_not_finite_rejects_a_candidate_and_is_reported(tmp_path: Path) -> None:
    extrapolation, learner = opened(tmp_path, accept="not_worse"), Line(mlp__w=[1.0])
    extrapolation.start(learner)
    learner.values["mlp.w"] += 1
    asyncio.run(extrapolation.after_step(learner, scripted(learner, [0.5, 0.6, math.nan])[0], 2))
    assert extrapolation.services.listener.texts == [
        "step 2: the jump by 4 displacements was rejected, because its score is nan"
    ]  # type: ignore[attr-defined]
    assert searches(tmp_path)[0]["tried"][1]["score"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_of_now_without_a_finite_score_are_an_error(tmp_path: Path, bad: float) -> None:
    with pytest.raises(
        RefluxError,
        match=r"step 1: extrapolation's score of the student at its current weights is .*nothing can be",
    ):
        one_search(tmp_path, [bad])


def test_no_displacement_no_search(tmp_path: Path) -> None:
    extrapolation, learner = opened(tmp_path), Line(mlp__w=[1.0])
    extrapolation.start(learner)
    assert not asyncio.run(extrapolation.after_step(learner, scripted(learner, [])[0], 1))
    assert [(row["delta_norm"], row["here"], row["tried"]) for row in searches(tmp_path)] == [(0.0, None, [])]


def test_between_its_steps_nothing_is_read_scored_or_written(tmp_path: Path) -> None:
    extrapolation, learner = opened(tmp_path), Line(mlp__w=[1.0])
    extrapolation.start(learner)
    learner.read = None  # type: ignore[assignment,method-assign]
    for step in (0, 3, 5, 6, 7, 9):
        assert not extrapolation.fires(step)
        assert not asyncio.run(extrapolation.after_step(learner, None, step))
    assert not any(opened(tmp_path, tries=0).fires(step) for step in range(20))
    assert list(tmp_path.iterdir()) == []


def test_a_rescored_incumbent_has_the_dice_of_its_comparison(tmp_path: Path) -> None:
    """2.25 is lucky once. It is scored again with new random numbers, and the next candidate beats it."""
    learner, asked, _ = one_search(tmp_path, [0.5, 0.9, 0.6, 0.7, 0.65, 0.65], rescore_incumbent=True)
    assert asked == [(1.25, 0), (1.75, 0), (1.75, 1), (2.25, 1), (2.25, 2), (2.75, 2)]
    assert learner.values["mlp.w"].tolist() == [2.25]
    assert [trial["against"] for trial in searches(tmp_path)[0]["tried"]] == [0.5, 0.6, 0.65]


@given(
    scores=st.lists(st.integers(0, 5).map(float) | st.just(math.nan), min_size=6, max_size=6).filter(
        lambda s: s[0] == s[0]
    ),
    tries=st.integers(0, 5),
    ties=st.booleans(),
)
def test_it_is_the_algorithm_of_the_page(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float], tries: int, ties: bool
) -> None:
    best, best_score = 0, scores[0]
    for m, s in zip([2, 4, 6, 8, 10][:tries], scores[1:], strict=False):
        if s > best_score or (ties and s == best_score):
            # the kept score never falls
            assert s >= best_score
            best, best_score = m, s
        else:
            break
    folder = tmp_path_factory.mktemp("page")
    learner, _, _ = one_search(folder, scores, tries=tries, accept="not_worse" if ties else "better")
    assert learner.values["mlp.w"].tolist() == [1.25 + best * 0.25]


# --- the quadratic sandbox: loss 1/2 d'Ad - b'd


def descend(learner: Line, a: np.ndarray, b: np.ndarray, eta: float) -> None:
    learner.values["mlp.w"] -= eta * torch.from_numpy(a @ learner.values["mlp.w"].numpy() - b)


def exact_score(learner: Line, a: np.ndarray, b: np.ndarray) -> Callable[..., Any]:
    async def score(rng: int = 0) -> float:
        d = learner.values["mlp.w"].numpy()
        return float(-(0.5 * d @ a @ d - b @ d))

    score.spent = Spent(Work(sampled=7))  # type: ignore[attr-defined]

    return score


@pytest.mark.parametrize(
    "pull", [0.01, 0.09, 0.0999, 0.1001, 0.12, 0.126, 0.16, 0.17, 0.24, 0.26, 0.49, 0.501, 0.9, 1.5]
)
def test_with_one_eigenvalue_candidate_k_is_accepted_iff_eta_lambda_is_below_one_over_2k(
    tmp_path: Path, pull: float
) -> None:
    """pull = eta lambda: all five below 0.1, none from 0.5 up."""
    a, b, eta = np.eye(3) * 4.0, np.asarray([1.0, -2.0, 0.5]), pull / 4.0
    learner, extrapolation = Line(mlp__w=[0.0, 0.0, 0.0]), opened(tmp_path)
    extrapolation.start(learner)
    descend(learner, a, b, eta)
    asyncio.run(extrapolation.after_step(learner, exact_score(learner, a, b), 1))
    accepted = 2 * sum(pull < 1 / (2 * k) for k in range(1, 6))
    assert searches(tmp_path)[0]["accepted"] == accepted
    np.testing.assert_allclose(learner.values["mlp.w"].numpy(), (1 + accepted) * eta * b, rtol=1e-12)


def test_displacements_are_trainings_alone(tmp_path: Path) -> None:
    """Eight steps with several eigenvalues against the formula: after a jump the next displacement starts
    where it landed.
    """
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    lam, b, eta = np.asarray([0.2, 1.0, 3.0, 7.0]), rng.normal(size=4), 0.02
    a = u @ np.diag(lam) @ u.T
    learner, extrapolation = Line(mlp__w=[0.0] * 4), opened(tmp_path)
    extrapolation.start(learner)
    # where the last search ended, and the steps since
    start, since = np.zeros(4), 0
    for step in range(1, 9):
        descend(learner, a, b, eta)
        since += 1
        # from any point d0: d_s = d0 + sum_i [1 - (1 - eta lam_i)^s] / lam_i <b - A d0, u_i> u_i
        delta = u @ ((1 - (1 - eta * lam) ** since) / lam * (u.T @ (b - a @ start)))
        np.testing.assert_allclose(learner.values["mlp.w"].numpy(), start + delta, rtol=1e-9)
        asyncio.run(extrapolation.after_step(learner, exact_score(learner, a, b), step))
        if fires(step):
            row = searches(tmp_path)[-1]
            assert row["delta_norm"] == pytest.approx(float(np.linalg.norm(delta)), rel=1e-9)
            start, since = start + (1 + row["accepted"]) * delta, 0
            np.testing.assert_allclose(learner.values["mlp.w"].numpy(), start, rtol=1e-9)
            np.testing.assert_array_equal(
                extrapolation._anchor["mlp.w"].numpy(), learner.values["mlp.w"].numpy()
            )
    assert [row["step"] for row in searches(tmp_path)] == [1, 2, 4, 8]
    assert sum(row["accepted"] > 0 for row in searches(tmp_path)) >= 2


# --- the learner of the library


def batch() -> list[list[Any]]:
    from reflux.assets.characters import character_tokenizer
    from reflux.models.text import as_model

    teacher = as_model(tiny.net(2), character_tokenizer())
    return [[tiny.attempt(tiny.rollout(n, seed=n), teacher)] for n in (3, 8, 5)]


def stepped(
    folder: Path, scores: list[float], lora: Lora | None = None
) -> tuple[Any, OpenExtrapolate, dict[str, Any], dict[str, Tensor]]:
    """(learner, extrapolation, its state, its weights) after one optimiser step; then the search is run with
    these scores.
    """
    learner, extrapolation = tiny.learner(tiny.net(1), lr=0.05, lora=lora), opened(folder)
    extrapolation.start(learner.access)
    tiny.move(learner, batch(), [Divergence()])
    state = {name: torch.as_tensor(value).clone() for name, value in learner.state().items()}
    weights = {name: value.clone() for name, value in learner.weights.items()}
    given = iter(scores)

    async def score(rng: int = 0) -> float:
        return next(given)

    score.spent = Spent(Work(sampled=7))  # type: ignore[attr-defined]

    asyncio.run(extrapolation.after_step(learner.access, score, 1))
    return learner, extrapolation, state, weights


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=8)])
def test_after_a_first_rejection_every_bit_is_that_of_before(tmp_path: Path, lora: Any) -> None:
    learner, _, state, weights = stepped(tmp_path, [0.5, 0.5], lora)
    assert same(weights, dict(learner.weights))
    assert same(
        state, {name: value for name, value in learner.state().items() if not name.startswith("base/")}
    )


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=8)])
def test_a_jump_adds_a_multiple_of_the_full_weights_displacement(tmp_path: Path, lora: Any) -> None:
    """With adapters by product: their factors stay, the frozen base takes it. Nothing else moves, not even
    the optimiser.
    """
    learner, extrapolation, state, weights = stepped(tmp_path, [0.5, 0.6, 0.7, 0.1], lora)
    start, after = tiny.net(1).state_dict(), dict(learner.weights)
    names = set(moved(learner.access.names, Extrapolate().include))
    assert len(names) == 7
    far = 0.0
    for name, here in weights.items():
        if name not in names:
            assert torch.equal(after[name], here), name
            continue
        delta = here - start[name]
        torch.testing.assert_close(after[name], here + 4 * delta, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(extrapolation._anchor[f"{name}"], after[name], rtol=0, atol=0)
        far = max(far, float(delta.abs().max()))
    assert far > 0.01
    kept = {name: value for name, value in learner.state().items() if not name.startswith("base/")}
    still = {name for name in state if lora or name.removeprefix("weight/") not in names}
    assert {name for name in state if torch.equal(torch.as_tensor(kept[name]), state[name])} == still
    assert kept.keys() == state.keys()


def test_a_learner_takes_up_moved_bases_and_exports_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    learner, *_ = stepped(tmp_path, [0.5, 0.6, 0.1], Lora(rank=2, alpha=8))
    again = tiny.learner(tiny.net(1), lr=0.05, lora=Lora(rank=2, alpha=8))
    again.take_up(
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in learner.state().items()
        }
    )
    assert same(dict(again.weights), dict(learner.weights))
    assert same(again.state(), learner.state())
    for groups in (batch(),):
        for one in (learner, again):
            tiny.move(one, groups, [Divergence()], step=1)
    assert same(dict(again.weights), dict(learner.weights))
    learner.export(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert same(
        {name: loaded[name] for name in learner.access.names},
        {name: learner.weights[name] for name in learner.access.names},
    )


def test_names_that_match_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"include = \['attnn'\] matches no parameter of tiny.*model\.embed_tokens\.weight"
    ):
        opened(tmp_path, include=("attnn",)).start(tiny.learner(tiny.net(1)).access)


def test_the_anchor_is_saved_and_a_checkpoint_without_it_is_refused(tmp_path: Path) -> None:
    extrapolation = opened(tmp_path)
    extrapolation.start(Line(mlp__w=[1.0, 2.0], other=[3.0]))
    extrapolation.save(tmp_path / "kept")
    again = opened(tmp_path)
    again.load(tmp_path / "kept")
    assert same(extrapolation._anchor, again._anchor)
    assert list(again._anchor) == ["mlp.w"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="has no anchor"):
        opened(tmp_path).load(tmp_path / "empty")


@pytest.mark.parametrize(
    "fields",
    [{"tries": -1}, {"prompts": 0}, {"samples": 0}, {"accept": "any"}, {"score": "loss"}, {"max_tokens": 0}],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Extrapolate(**fields)
