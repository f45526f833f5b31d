"""Several adapters in one batch: every row is what it is alone, in float64, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_flow
from device import DEVICE
from reflux.models.flow.flow_adapters import Adapter, Factors, attach, layers_of, switch_off
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.row_adapters import row_adapters

# rank, scale and layers of each adapter: they differ in all of them, and two layers have no adapter in common
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"seed": 3, "rank": 2, "scale": 2.0, "ends": tiny_flow.ENDS},
    "two": {"seed": 4, "rank": 3, "scale": 0.3, "ends": ("to_k", "proj_out", "norm1.linear")},
    "three": {"seed": 5, "rank": 1, "scale": -1.7, "ends": ("to_q", "linear_1")},
}
ORDERS = {
    "grouped": ["one", "one", "two", "two", "three", None, None],
    "mixed": [None, "two", "one", "three", None, "two", "one"],
    "without a base": ["three", "one", "three", "two", "two", "one", "one"],
    "one only": ["two"] * 7,
    "none": [None] * 7,
}


def adapter(of: FlowModel, seed: int, scale: float, **fields: Any) -> Adapter:
    made = tiny_flow.factors(of, seed, **fields)
    return Adapter({name: Factors(A, B, scale) for name, (A, B) in made.items()}, "made")


def model(*names: str | None) -> FlowModel:
    """A tiny model in float64 with these adapters, the last of which is active, as peft leaves it."""
    made = tiny_flow.model(1)
    adapters = {name: adapter(made, **ADAPTERS[name]) for name in names if name is not None}
    made.net.to(DEVICE, torch.float64)
    for name, one in adapters.items():
        attach(made.net.transformer, one, name)
    made.net.requires_grad_(False)
    return made


@torch.inference_mode()
def outputs(of: FlowModel, rows: list[int]) -> Tensor:
    """What the transformer gives for these rows of seven states at seven times, each with its own prompt."""
    rng = torch.Generator().manual_seed(9)
    x = torch.randn(7, 1, 4, 4, generator=rng, dtype=torch.float64).to(DEVICE)
    t = torch.linspace(1000.0, 100.0, 7, device=DEVICE)
    tokens, pooled = of.encode([tiny_flow.TEXTS[row % 6] for row in rows])
    return of.net.transformer(
        hidden_states=x[rows],
        timestep=t[rows],
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def layers(of: FlowModel) -> list[Any]:
    switch_off(of.net.transformer)
    return [layer for _, layer in layers_of(of.net.transformer)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_row_is_what_it_is_alone(order: list[str | None]) -> None:
    """Alone: one row, on a model that has only its adapter, which peft computes."""
    together = model(*ADAPTERS)
    with row_adapters(layers(together), order):
        found = outputs(together, list(range(7)))
    for row, name in enumerate(order):
        (expected,) = outputs(model(name), [row])
        torch.testing.assert_close(found[row], expected, rtol=1e-11, atol=1e-11)
    gap = (found - outputs(model(None), list(range(7)))).abs().flatten(1).amax(1)
    assert [bool(value > 0.01) for value in gap] == [name is not None for name in order]


@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6), (5, 2, 3, 6)])
def test_a_layer_is_the_formula(shape: tuple[int, ...]) -> None:
    """x W^T + b + scale (x A^T) B^T, by numpy, for the rows of the adapter and for no other."""
    rng = np.random.default_rng(0)
    x, W, b = rng.normal(size=shape), rng.normal(size=(7, 6)), rng.normal(size=7)
    A, B = rng.normal(size=(2, 6)), rng.normal(size=(7, 2))
    net: Any = torch.nn.ModuleDict({"layer": torch.nn.Linear(6, 7)}).to(DEVICE, torch.float64)
    with torch.no_grad():
        net["layer"].weight.copy_(torch.from_numpy(W))
        net["layer"].bias.copy_(torch.from_numpy(b))
    attach(net, Adapter({"layer": Factors(torch.from_numpy(A), torch.from_numpy(B), 0.7)}, "made"), "a")
    switch_off(net)
    with torch.no_grad(), row_adapters([net["layer"]], [None, "a", "a", None, "a"]):
        found = net["layer"](torch.from_numpy(x).to(DEVICE)).cpu().numpy()
    change = 0.7 * x @ A.T @ B.T
    change[[0, 3]] = 0
    np.testing.assert_allclose(found, x @ W.T + b + change, rtol=1e-12, atol=1e-12)


def test_afterwards_the_base_is_alone_again() -> None:
    """Bit for bit, also after an error."""
    made, rows = model(*ADAPTERS), list(range(7))
    of_model = layers(made)
    before = outputs(made, rows)
    with row_adapters(of_model, ORDERS["mixed"]):
        assert not torch.equal(outputs(made, rows), before)
    assert torch.equal(outputs(made, rows), before)
    with pytest.raises(RuntimeError, match="stopped"), row_adapters(of_model, ORDERS["mixed"]):
        raise RuntimeError("stopped")
    assert torch.equal(outputs(made, rows), before)
    assert torch.equal(outputs(made, rows), outputs(model(None), rows))


def test_another_number_of_rows_is_an_error() -> None:
    """A slice beyond the batch would leave rows without their adapter, and say nothing."""
    made = model("one")
    with (
        row_adapters(layers(made), ["one"] * 4),
        pytest.raises(ValueError, match="a batch of 3 rows, and adapters are given for 4"),
    ):
        outputs(made, [0, 1, 2])
