"""The layers of a model, and torch.compile of each layer by itself, so that the state dict and the model's
class stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reflux.errors import ModelError


def layers_of(net: Any) -> list[Any]:
    """The layers of a transformers model, by the class that marks them; empty if the model has none of it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in net.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(net: Any, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the forward pass of every layer in place, for any number of tokens. Layers of one class share
    the compiled program. Returns the number of layers.

    backend: of torch.compile. ModelError if the class of the layers is not known.
    """
    layers = layers_of(net)
    if not layers:
        raise ModelError(
            f"learner.compile: the layers of {type(net).__name__} are not of the class by which transformers "
            "marks layers. Leave learner.compile out."
        )
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
