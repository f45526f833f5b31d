"""What the doctor says about memory, on a device of which the memory is known."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from reflux.evals import memory_findings
from reflux.kernels.budget import table_bytes


class Device:
    """A device on which passes take 3,000,000 bytes and 2,000 a token."""

    def __init__(self, free: int):
        self.free, self.tokens = free, 0

    def free_bytes(self) -> int:
        return self.free

    def begin(self) -> None: ...

    def taken_bytes(self) -> int:
        return 3_000_000 + 2_000 * self.tokens


def found(free: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    device, learner, passes = Device(free), tiny.learner(tiny.net(1)), memory_findings._pass

    def counted(learner: Any, tokens: int) -> None:
        device.tokens = tokens
        passes(learner, tokens)

    monkeypatch.setattr(memory_findings, "_pass", counted)
    (finding,) = memory_findings.memory(learner, device)
    assert all(parameter.grad is None for parameter in learner.trained.values())
    return finding


def test_the_largest_micro_batch_follows_from_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the free memory 80 % are given away, less the fixed part and what the loss takes."""
    free = 10**9
    head = tiny.net(1).get_output_embeddings().weight.numel()
    fitting = int((0.8 * free - 3_000_000 - table_bytes("cpu") - 4 * head) / 2_000)
    finding = found(free, monkeypatch)
    assert finding.verdict == "ok"
    assert f"up to {fitting:,} tokens fit" in finding.text
    assert "takes 0.002 MB" in finding.text


def test_a_device_that_is_full_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(10**6, monkeypatch)
    assert (finding.verdict, "up to 0 tokens" in finding.text) == ("warning", True)


@pytest.mark.parametrize("pack", [False, True])
def test_without_a_measure_the_process_and_the_estimate_are_told(pack: bool) -> None:
    learner = tiny.learner(tiny.net(1))
    (finding,) = memory_findings.memory(learner, None)
    assert "this process has taken" in finding.text
    assert "estimated activations" in finding.text
    learner.padded_because = "" if pack else "it has recurrent layers"
    memory_findings._pass(learner, 256)
    text = memory_findings.rows({"the learner": learner}).text
    way = "packed rows" if pack else "padded rows (it has recurrent layers)"
    assert text == f"the learner reads {way}"
