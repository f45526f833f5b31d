"""A checkpoint gets its name only when it is complete. It restores what it saved. The last k are kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from reflux.errors import RunError
from reflux.storage import checkpoints

STATES = {
    "learner": {
        "version": 3,
        "weight/a.b": torch.randn(3, 2),
        "half": torch.randn(4).bfloat16(),
        "step": torch.tensor(5.0),
    },
    "teachers": {},
    "extrapolation": {"path": [1.5, None, "x"], "trace": torch.arange(4)},
}


def save(folder: Path, step: int, states: dict[str, dict[str, Any]], keep: int) -> None:
    fills = {part: partial(checkpoints.write, state=state) for part, state in states.items()}
    checkpoints.save(folder, step, fills, keep)


def load(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    return {path.name: checkpoints.read(path) for path in checkpoints.of_step(folder, step).iterdir()}


def test_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 7, STATES, keep=1)
    again = load(tmp_path, 7)
    assert again.keys() == STATES.keys()
    for part, state in STATES.items():
        assert again[part].keys() == state.keys()
        for key, value in state.items():
            same = (
                torch.equal(again[part][key], value)
                if isinstance(value, torch.Tensor)
                else again[part][key] == value
            )
            assert same, (part, key)


def test_a_slice_of_a_larger_tensor_is_saved_as_itself(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save(tmp_path, 1, {"a": {"x": whole.t()[1:3], "y": whole[1]}}, keep=1)
    assert torch.equal(load(tmp_path, 1)["a"]["x"], whole.t()[1:3])


def test_the_last_ones_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save(tmp_path, step, STATES, keep=2)
    assert checkpoints.steps(tmp_path) == [10, 100]
    assert checkpoints.steps(tmp_path / "none") == []


def test_what_is_incomplete_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, STATES, keep=2)
    with pytest.raises(TypeError):
        save(tmp_path, 2, {"learner": STATES["learner"], "bad": {"x": object()}}, keep=2)
    assert checkpoints.steps(tmp_path) == [1]
    (tmp_path / "step-x").mkdir()
    assert checkpoints.steps(tmp_path) == [1]
    save(tmp_path, 2, STATES, keep=2)
    assert checkpoints.steps(tmp_path) == [1, 2]


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, {"a": {"x": 1}}, keep=1)
    save(tmp_path, 1, {"a": {"x": 2}}, keep=1)
    assert load(tmp_path, 1) == {"a": {"x": 2}}


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("content", [b"", b'{"a'])
def test_a_damaged_folder_is_refused_with_the_remedy(name: str, content: bytes, tmp_path: Path) -> None:
    save(tmp_path, 4, STATES, keep=2)
    (checkpoints.of_step(tmp_path, 4) / "learner" / name).write_bytes(content)
    with pytest.raises(
        RunError,
        match=r"learner is damaged: .*Remove .*step-4; --resume then continues from the previous checkpoint",
    ):
        load(tmp_path, 4)
