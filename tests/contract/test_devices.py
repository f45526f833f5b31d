"""Runs on a device that is not the CPU, on any machine: with the stand-in (standin.py) in another process,
where no run may mix its tensors with those of the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from device import DEVICE, here
from reflux.errors import ModelError
from reflux.kernels.head import Head
from reflux.models.logit_checks import refuse_wrong_logits

TESTS = Path(__file__).parents[1]
CHOSEN = (
    "contract/test_devices.py",
    "contract/test_preflight.py::test_lora_passes_before_and_after_the_first_update",
    "contract/test_extrapolation_part.py::test_a_jump_moves_the_student_and_everyone_learns_of_it",
    "laws/test_flow_runs.py::test_a_run_that_was_stopped_goes_on_bit_for_bit[flow]",
    "laws/test_parity.py::test_both_agree_with_the_model_itself",
    "laws/test_repeats.py::test_with_deterministic_a_run_repeats_bit_for_bit[opd-more2]",
    "laws/test_resume.py::test_stopping_changes_nothing[3-vopd]",
)
on_the_standin = pytest.mark.skipif(DEVICE != "standin", reason="of the stand-in itself")
beside_the_cpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a second device")


@pytest.mark.skipif(DEVICE != "cpu", reason="starts these tests on the stand-in")
# half a minute on a free core, minutes where the machine is busy
@pytest.mark.timeout(1500)
def test_runs_keep_to_their_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short"]
    env = {**os.environ, "REFLUX_TEST_DEVICE": "standin"}
    done = subprocess.run([*command, *CHOSEN], cwd=TESTS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@on_the_standin
def test_the_standin_keeps_its_tensors_apart() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="all tensors"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="on one device"):
        x.gather(-1, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="convert standin:0 device type tensor to numpy"):
        x.numpy()
    assert x[torch.tensor([1])].device.type == DEVICE
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="deterministic"):
        x.cumsum(-1)


@on_the_standin
def test_a_model_without_deterministic_algorithms_is_refused_in_words() -> None:
    from methods.test_token_steps import model

    torch.use_deterministic_algorithms(True)
    words = r"learner\.model: .* deterministic implementation.* leave deterministic out"
    with pytest.raises(ModelError, match=words):
        refuse_wrong_logits(model("state space"), "a mamba", "learner.model")


@on_the_standin
def test_the_standin_computes_what_the_cpu_computes() -> None:
    """Views write into what they show, gradients arrive, and a fused optimiser moves its parameters."""
    found = []
    for device in ("cpu", DEVICE):
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(4, 6, generator=rng).to(device)
        x[1:3].mul_(2)
        weight = torch.randn(6, 5, generator=rng).to(device).requires_grad_()
        optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
        (x @ weight).log_softmax(-1).square().sum().backward()
        optimiser.step()
        found.append([t.detach().cpu() for t in (x, weight, weight.grad, x.sort(-1).indices.T)])  # type: ignore[union-attr]
    for on_cpu, on_device in zip(*found, strict=True):
        torch.testing.assert_close(on_device, on_cpu)


@beside_the_cpu
@pytest.mark.parametrize("alone", ["learner", "sampler", "teachers__main"])
def test_parts_may_be_on_different_devices(tiny_run: Callable[..., Any], alone: str) -> None:
    """The run is that of one device up to rounding."""
    devices = dict.fromkeys(("learner__device", "sampler__device", "teachers__main__device"), "cpu")
    settings = (devices, {**devices, f"{alone}__device": DEVICE})
    one, other = (tiny_run("full", steps=1, **more) for more in settings)
    (row,), (same_row,) = one.rows("metrics"), other.rows("metrics")
    assert same_row["loss"] == pytest.approx(row["loss"], rel=1e-4)


@beside_the_cpu
def test_a_head_reads_states_and_ids_of_another_device() -> None:
    weight_VH, h_NH = torch.randn(11, 4), torch.randn(3, 4)
    ids_NK = torch.tensor([[0, 10], [3, 3], [7, 1]])
    found = Head.of(here(weight_VH)).logp_at(h_NH, ids_NK).cpu()
    torch.testing.assert_close(found, (h_NH @ weight_VH.T).log_softmax(-1).gather(-1, ids_NK))
