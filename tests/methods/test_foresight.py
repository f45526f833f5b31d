"""Foresight diagnostics against their definitions, in float64 numpy, and along runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reflux.errors import RunError
from reflux.evals.foresight import (
    Foresight,
    alignment,
    effective_rank,
    foresight,
    rho,
    spectral_norm,
    top_norm_ratio,
)
from tiny import same

PERCENTS = (1.0, 10.0, 29.0, 50.0, 100.0)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000))


def matrix(rows: int, columns: int, seed: int, dtype: Any = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng((rows, columns, seed)).normal(size=(rows, columns))).to(
        dtype
    )


def with_values(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values, in directions from random numbers."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return torch.from_numpy(u @ np.diag(values) @ v.T)


@given(size=sizes, percent=st.sampled_from(PERCENTS))
def test_they_are_what_they_are_defined_as(size: tuple[int, int, int], percent: float) -> None:
    delta = matrix(*size)
    s = np.linalg.svd(delta.numpy(), compute_uv=False)
    z = s / s.sum()
    k = -(-len(s) * int(percent) // 100)
    assert spectral_norm(delta) == pytest.approx(np.linalg.norm(delta.numpy(), 2), rel=1e-9)
    assert rho(delta) == pytest.approx(s[0] / np.linalg.norm(delta.numpy()), rel=1e-9)
    assert effective_rank(delta) == pytest.approx(np.prod([share**-share for share in z]), rel=1e-9)
    assert top_norm_ratio(delta, percent) == pytest.approx(
        math.sqrt((s[:k] ** 2).sum() / (s**2).sum()), rel=1e-9
    )


@given(size=sizes, percent=st.sampled_from(PERCENTS), scale=st.floats(1e-3, 1e3))
def test_ranges_and_what_a_scale_changes(size: tuple[int, int, int], percent: float, scale: float) -> None:
    delta, r, slack = matrix(*size), min(size[:2]), 1e-9
    assert 1 / math.sqrt(r) - slack <= rho(delta) <= 1 + slack
    assert 1 - slack <= effective_rank(delta) <= r + slack
    assert rho(delta) - slack <= top_norm_ratio(delta, percent) <= 1 + slack
    assert alignment(delta, delta) == pytest.approx(1, abs=slack)
    assert spectral_norm(scale * delta) == pytest.approx(scale * spectral_norm(delta), rel=1e-9)
    for measure in (rho, effective_rank, lambda d: top_norm_ratio(d, percent)):
        assert measure(scale * delta) == pytest.approx(measure(delta), rel=1e-9)
    assert alignment(scale * delta, delta) == pytest.approx(1, abs=1e-7)


def test_rank_one_and_a_flat_spectrum() -> None:
    one = with_values([3.0], 6, 4)
    for measure in (rho, effective_rank, top_norm_ratio):
        assert measure(one) == pytest.approx(1, rel=1e-9)
    flat = with_values([2.0] * 5, 8, 5)
    assert rho(flat) == pytest.approx(1 / math.sqrt(5), rel=1e-9)
    assert effective_rank(flat) == pytest.approx(5, rel=1e-9)
    assert top_norm_ratio(flat, 40) == pytest.approx(math.sqrt(2 / 5), rel=1e-9)


def test_the_entropy_is_that_of_values_and_not_of_squares() -> None:
    assert effective_rank(with_values([3.0, 1.0], 4, 4)) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


@pytest.mark.parametrize(
    ("rows", "percent", "k"),
    [
        (100, 1, 1),
        (101, 1, 2),
        (100, 29, 29),
        (100, 7, 7),
        (250, 64.4, 161),
        (10, 10, 1),
        (10, 11, 2),
        (3, 0.1, 1),
    ],
)
def test_how_many_directions_a_percentage_is(rows: int, percent: float, k: int) -> None:
    delta = torch.diag(torch.linspace(2, 1, rows, dtype=torch.float64))
    s = np.linspace(2, 1, rows)
    assert top_norm_ratio(delta, percent) == pytest.approx(
        math.sqrt((s[:k] ** 2).sum() / (s**2).sum()), rel=1e-12
    )
    if k == 1:
        assert top_norm_ratio(delta, percent) == pytest.approx(rho(delta))


def test_alignment_is_of_left_directions_in_order_without_sign() -> None:
    u, v = torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    s = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    delta = u[:, :3] @ s @ v
    turned = torch.linalg.qr(matrix(3, 3, 5))[0]
    # right directions and signs do not count
    assert alignment(delta, -u[:, :3] @ s @ turned) == pytest.approx(1)
    assert alignment(delta, u[:, [0, 1, 3]] @ s @ v) == pytest.approx(2 / 3)
    assert alignment(delta, u[:, [0, 1, 3]] @ s @ v, k=2) == pytest.approx(1)
    assert alignment(delta, u[:, [1, 0, 2]] @ s @ v) == pytest.approx(1 / 3)
    crossed = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert alignment(crossed[:, :1], crossed[:, 1:]) == pytest.approx(0, abs=1e-12)
    half = u.clone()
    half[:2, 0] = math.sqrt(0.5)
    assert alignment(delta, half[:, :1] @ v[:1], k=1) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    "measure", [spectral_norm, rho, effective_rank, top_norm_ratio, lambda d: alignment(d, d)]
)
def test_what_is_no_matrix_is_refused(measure: Callable[[Tensor], float]) -> None:
    for bad in (torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="a displacement must be a matrix"):
            measure(bad)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            measure(torch.tensor([[1.0, value]]))


def test_zero_has_a_norm_and_no_directions() -> None:
    zero = torch.zeros(3, 2)
    assert spectral_norm(zero) == 0
    for measure in (
        rho,
        effective_rank,
        top_norm_ratio,
        lambda d: alignment(d, torch.ones(3, 2)),
        lambda d: alignment(torch.ones(3, 2), d),
    ):
        with pytest.raises(ValueError, match="zero"):
            measure(zero)


def test_numbers_out_of_range_are_refused() -> None:
    for percent in (0.0, -1.0, 100.5, math.nan):
        with pytest.raises(ValueError, match="percent"):
            top_norm_ratio(torch.ones(2, 2), percent)
    with pytest.raises(ValueError, match="k must be"):
        alignment(torch.ones(2, 2), torch.ones(2, 2), k=0)
    with pytest.raises(ValueError, match="differ in shape"):
        alignment(torch.ones(2, 3), torch.ones(3, 2))


def test_foresight_is_the_mean_over_moved_matrices() -> None:
    start = {
        "h.0.attn.q.weight": matrix(6, 4, 0),
        "h.0.attn.q.bias": torch.zeros(6),
        "h.0.mlp.up.weight": matrix(5, 5, 1),
        "h.1.mlp.up.weight": matrix(5, 5, 2),
        "h.1.mlp.norm.weight": matrix(5, 5, 3),
        "embed.weight": matrix(9, 4, 4),
    }
    deltas = {"h.0.attn.q.weight": matrix(6, 4, 5), "h.0.mlp.up.weight": matrix(5, 5, 6)}
    others = {
        "h.0.attn.q.bias": torch.ones(6),
        "h.1.mlp.norm.weight": torch.ones(5, 5),
        "embed.weight": torch.ones(9, 4),
    }
    weights = {name: value + (deltas | others).get(name, 0 * value) for name, value in start.items()}
    found = foresight(weights, start, percent=40.0)
    assert (found["matrices"], found["unmoved"]) == (3, 1)
    for name, measure in {
        "spectral_norm": spectral_norm,
        "rho": rho,
        "effective_rank": effective_rank,
    }.items():
        assert found[name] == pytest.approx(np.mean([measure(delta) for delta in deltas.values()]), rel=1e-6)
    assert found["top_norm_ratio"] == pytest.approx(
        np.mean([top_norm_ratio(delta, 40.0) for delta in deltas.values()]), rel=1e-6
    )
    nothing = foresight(start, start)
    assert (nothing["unmoved"], nothing["spectral_norm"], nothing["rho"]) == (3, None, None)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.q\.weight has no start weights"):
        foresight(weights, {})
    with pytest.raises(ValueError, match="not finite"):
        foresight(weights | {"h.0.mlp.up.weight": torch.full((5, 5), math.nan)}, start)


# --- along a run

CHAT: dict[str, Any] = {"task": {"kind": "outside:Chat"}}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
def test_a_run_reports_what_its_weights_did(tiny_run: Callable[..., Any], student: str, lora: Any) -> None:
    """Against the exported students of shorter runs: spectra by step, and alignment of the earlier ones with
    the last.
    """
    from transformers import AutoModelForCausalLM

    def weights(folder: Path | str) -> dict[str, Tensor]:
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    settings = {**CHAT, "learner__lora": lora, "learner__lr": 0.01}
    done = tiny_run("full", steps=4, **settings, eval_every=2, evals__foresight={"percent": 20.0, "k": 3})
    start, half, end = (
        weights(student),
        weights(tiny_run("full", steps=2, **settings).dir / "student"),
        weights(done.dir / "student"),
    )
    rows = {row["step"]: row["foresight"] for row in done.rows("evals")}
    assert list(rows) == [0, 2, 4]
    assert (rows[0]["unmoved"], rows[0]["matrices"], rows[0]["rho"]) == (7, 7, None)
    for step, found in ((2, half), (4, end)):
        wanted = foresight(found, start, percent=20.0)
        assert {name: rows[step][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    names = [name for name in end if "proj" in name]
    aligned = np.mean([alignment(half[name] - start[name], end[name] - start[name], 3) for name in names])
    assert rows[4]["alignment"] == {"2": pytest.approx(aligned, rel=1e-3)}
    assert rows[2]["alignment"] == {}


def test_a_table_writes_into_a_folder_of_its_own(tiny_run: Callable[..., Any]) -> None:
    """Whatever its name: one called `student` leaves the exported student alone, and finds its start weights
    again.
    """
    done = tiny_run("opd", steps=2, **CHAT, eval_every=1, evals__student={"kind": "foresight"})
    assert [row["student"]["unmoved"] for row in done.rows("evals")] == [7, 0, 0]
    folder = done.dir / "parts" / "evals.student"
    assert sorted(path.name for path in folder.iterdir()) == ["start", "step-0", "step-1", "step-2"]
    assert not (done.dir / "student" / "start").exists()


def test_looking_ahead_changes_nothing(tiny_run: Callable[..., Any]) -> None:
    plain = tiny_run("opd", steps=3, **CHAT)
    assert same(plain.state, tiny_run("opd", steps=3, **CHAT, eval_every=1, evals__foresight={}).state)


def test_switched_on_too_late_it_says_so(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1, **CHAT)
    with pytest.raises(RunError, match="switched on after the first step"):
        tiny_run("opd", steps=2, **CHAT, evals__foresight={}, out=done.dir, resume=True)


def test_fields_out_of_range() -> None:
    for fields in ({"percent": 0.0}, {"percent": 101.0}, {"k": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Foresight(**fields)  # type: ignore[arg-type]
