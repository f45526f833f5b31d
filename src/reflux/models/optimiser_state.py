"""Trained weights and the moments of their optimiser as a table that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def optimiser_state(trained: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The weights as "weight/NAME" and Adam's moments as "adam.MOMENT/NAME". trained: the parameters that the
    optimiser moves, by name, in its order.
    """
    state: dict[str, Any] = {}
    for name, parameter in trained.items():
        state[f"weight/{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            state[f"adam.{key}/{name}"] = value
    return state


def restore_optimiser(
    trained: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Restore what `optimiser_state` returned. Other entries of `state` are ignored."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[f"weight/{name}"])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("adam."):
            kind, name = key.removeprefix("adam.").split("/", 1)
            moments.setdefault(name, {})[kind] = value.clone()
    placed = {place: moments[name] for place, name in enumerate(trained) if name in moments}
    # torch moves each value to the device on which the fused optimiser reads it.
    optimiser.load_state_dict(optimiser.state_dict() | {"state": placed})
