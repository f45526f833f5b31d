"""Values that know how to merge, and FLOP from the definition."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from reflux.metrics.values import Max, Mean, Quantiles, Sum, jsonable, merge, step_flops

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=20)


@given(numbers, st.data())
def test_merging_parts_is_the_whole(values: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    parts = [values[:cut], values[cut:]]
    whole = merge(
        {
            "mean": Mean.of(p),
            "sum": Sum(sum(p)),
            "max": Max(max(p, default=-np.inf)),
            "q": Quantiles(tuple(p)),
        }
        for p in parts
    )
    found = [whole[name].value for name in ("mean", "sum", "max", "q")]
    np.testing.assert_allclose(
        found, [np.mean(values), np.sum(values), max(values), np.median(values)], atol=1e-9
    )


def test_nothing_counted_is_null_and_not_zero() -> None:
    assert jsonable({"a": Mean(), "b": Max(), "c": Quantiles(), "d": Sum(), "e": np.float32(0.5),
                     "f": float("inf")}) == {
        "a": None, "b": None, "c": None, "d": 0.0, "e": 0.5, "f": None,
    }  # fmt: skip


def test_a_name_that_only_some_parts_have_counts_those() -> None:
    assert merge([{"a": Mean(2, 1)}, {"b": Sum(1)}, {"a": Mean(4, 1)}]) == {"a": Mean(6, 2), "b": Sum(1)}


def test_flops_by_hand_and_the_papers_fixed_prefix() -> None:
    assert step_flops(3, 5, 10, 4, 2) == {"sample": 84.0, "teach": 140.0, "learn": 216.0}
    fixed = step_flops(8.19e9, 8.19e9, 60 * 2048 * 80, 60 * 2048 * 256, 60 * 2048 * 256)
    # prefix.md: 3.4e18 in the paper
    assert sum(fixed.values()) == pytest.approx(3.38e18, rel=0.01)


@given(st.floats(0, 1e9), st.floats(0, 1e6))
def test_ten_flops_a_parameter_and_token_where_all_is_trained(parameters: float, tokens: float) -> None:
    assert sum(step_flops(parameters, parameters, 0, tokens, tokens).values()) == pytest.approx(
        10 * parameters * tokens
    )
    assert step_flops(parameters, 0, 7, tokens, 0)["teach"] == 0


@pytest.mark.parametrize("counts", [(-1, 1, 1, 1, 1), (1, 1, -1, 1, 1), (1, 1, 1, 1, 2)])
def test_impossible_counts_are_refused(counts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="counts must be"):
        step_flops(*counts)


def test_a_step_says_what_the_design_promises(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("rl_opd", steps=2, group_size=2, evals__accuracy={"problems": 2}, log_variance=True)
    first = done.rows("metrics")[0]
    promised = (
        "step loss kl_nats kl_nats_trained grad_norm staleness_mean staleness_max tokens_sampled "
        "tokens_trained seconds flops reward_mean"
    )
    assert set(promised.split()) <= first.keys()
    assert {"sample", "reward", "teach", "learn"} <= first["seconds"].keys()
    assert first["flops"].keys() == {"sample", "teach", "learn"}
    assert first["gradient_variance_ratio"] > 0
    summary = (
        "accuracy_before accuracy_after teacher_accuracy tokens_sampled tokens_sampled_total flops_total "
        "commit config_hash seed"
    )
    assert {"recipe", "method", "steps", "seconds", *summary.split()} <= done.summary.keys()
    assert done.summary["tokens_sampled"] == sum(row["tokens_sampled"] for row in done.rows("metrics"))
    assert done.summary["flops_total"] == pytest.approx(
        sum(sum(row["flops"].values()) for row in done.rows("metrics"))
    )


def test_the_kl_of_a_step_is_the_reverse_kl_to_main(tiny_run: Callable[..., Any], student: str) -> None:
    full, sampled, home = (
        tiny_run("full", steps=1, task={"kind": "outside:Chat"}),
        tiny_run("opd", steps=1, task={"kind": "outside:Chat"}),
        tiny_run("full", steps=1, task={"kind": "outside:Chat"}, teachers__main__model=student),
    )
    loss, kl = (full.rows("metrics")[0][name] for name in ("loss", "kl_nats_trained"))
    # every position kept: the loss is the mean divergence
    assert kl == pytest.approx(loss, rel=1e-5)
    # same attempts, same number
    assert sampled.rows("metrics")[0]["kl_nats_trained"] == pytest.approx(kl, rel=1e-5)
    assert abs(home.rows("metrics")[0]["kl_nats_trained"]) < 1e-6


def test_tensorboard_gets_the_metrics(tiny_run: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = tiny_run("opd", steps=2, track={"kind": "tensorboard"}, evals__accuracy={"problems": 2})
    events = EventAccumulator(str(done.dir / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in done.rows("metrics")])
    assert {"seconds/learn", "kl_nats", "accuracy/accuracy"} <= set(events.Tags()["scalars"])


def test_no_tracker_opens_in_a_folder_that_another_run_holds(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from reflux import training
    from reflux.errors import RunError

    opened: list[Any] = []
    monkeypatch.setattr(training, "open_tracker", lambda *asked: opened.append(asked))
    (tmp_path / "held").mkdir()
    with (tmp_path / "held" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="being written by another process"):
            tiny_run("opd", steps=1, out=tmp_path / "held", track={"kind": "tensorboard"})
    assert opened == []


def test_doctor_opens_no_run(student: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it starts no tracker, takes no lock and writes no file of a run."""
    from reflux.inspection.doctor import examine
    from reflux.training import Run

    opened: list[Any] = []
    monkeypatch.setattr(Run, "__init__", lambda self, *known: opened.append(known))

    async def findings() -> int:
        return len(
            [
                finding
                async for finding in examine(
                    tiny.config("opd", student, teacher, track={"kind": "tensorboard"}), prompts=2
                )
            ]
        )

    assert asyncio.run(findings()) > 3
    assert opened == []


def test_a_tracker_that_is_not_installed_is_named(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    from reflux.errors import ConfigError

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"track\.kind: 'wandb' is not installed .* pip install 'reflux\[track\]'"
    ):
        tiny_run("opd", steps=1, out=tmp_path / "run", track={"kind": "wandb"})
    # nothing of it is left in the way
    tiny_run("opd", steps=1, out=tmp_path / "run")
