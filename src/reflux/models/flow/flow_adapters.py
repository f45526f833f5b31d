"""Low-rank adapters on a flow's transformer: attached by peft and added to the weights (arXiv 2106.09685).

An adapter has two factors per linear layer, the LoRA matrices A and B, and changes the layer's weight by
scale * B A. One transformer may have several adapters; `row_adapters` applies them to the rows of one batch.
Modules have the names that they have inside the transformer ("transformer_blocks.0.attn.to_q").
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.errors import ModelError

if TYPE_CHECKING:
    from reflux.models.settings import FlowLora

# the name of the adapter that a learner trains
TRAINED = "default"


@dataclass(frozen=True)
class Factors:
    """The LoRA matrices A and B of one linear layer, whose adapted weight is weight + scale * B A."""

    # [rank, inputs]
    A: Tensor
    # [outputs, rank]
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)

    def delta(self) -> Tensor:
        """scale * B A, [outputs, inputs], in float64, so that the product loses no digits of A and B."""
        return self.scale * (self.B.detach().double() @ self.A.detach().double())


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: for each adapted linear layer, its matrices A and B, by module name."""

    factors: Mapping[str, Factors]
    # where the adapter comes from, for errors
    source: str

    def deltas(self) -> dict[str, Tensor]:
        """The change of each module's weight, float64."""
        return {name: factors.delta() for name, factors in self.factors.items()}


def lora_config(adapter: Adapter) -> Any:
    """A peft LoraConfig that matches the adapter's LoRA matrices, with the full names of the modules."""
    from peft import LoraConfig

    ranks = {name: factors.rank for name, factors in adapter.factors.items()}
    alphas = {name: factors.scale * factors.rank for name, factors in adapter.factors.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        # peft divides lora_alpha by the rank and accepts fractions, although its type is int.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank},
        alpha_pattern={f"^{re.escape(name)}": other for name, other in alphas.items() if other != alpha},
    )


def attach(transformer: Any, adapter: Adapter, name: str) -> None:
    """Add the matrices A and B of `adapter` to the layers of the transformer, in place. The new adapter is
    called `name` (no dots), is active and may be trained.
    """
    from peft import inject_adapter_in_model

    # peft reads only the names of these tensors.
    keys = {f"{module}.lora_A.weight": factors.A for module, factors in adapter.factors.items()}
    with warnings.catch_warnings():
        # Several adapters on one model are intended.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(lora_config(adapter), transformer, name, state_dict=keys)
    layers = dict(layers_of(transformer))
    with torch.no_grad():
        for module, factors in adapter.factors.items():
            layers[module].lora_A[name].weight.copy_(factors.A)
            layers[module].lora_B[name].weight.copy_(factors.B)
            # peft's alpha / rank may differ from the scale by rounding.
            layers[module].scaling[name] = factors.scale


def attach_fresh(transformer: Any, lora: FlowLora, seed: int) -> None:
    """Attach a new adapter to be trained. A comes from seeded random numbers and B = 0, so the model's
    outputs do not change. lora: rank, alpha and targets. ModelError where one of the targets is not the name
    of a linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))  # pyright: ignore[reportArgumentType]
    lost = missed(lora.targets, linear_shapes(transformer))
    if lost:
        raise ModelError(
            f"learner.lora.targets: no linear layer of this transformer is called {', '.join(lost)}. Remove "
            "it from the targets."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 63))
        inject_adapter_in_model(config, transformer, TRAINED)


def taken(transformer: Any, name: str = TRAINED) -> Adapter:
    """The adapter `name` on a transformer. Its LoRA matrices are the tensors in use, not copies."""
    found = ((module, layer) for module, layer in layers_of(transformer) if name in layer.scaling)
    factors = {
        m: Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for m, layer in found
    }
    return Adapter(factors, name)


def switch_off(transformer: Any) -> None:
    """Deactivate and freeze all adapters. The outputs are then bit-identical to those without adapters."""
    for _, layer in layers_of(transformer):
        layer.set_adapter([], inference_mode=True)


@torch.no_grad()
def add(transformer: Any, adapter: Adapter) -> None:
    """Add scale * B A of an adapter to the weights of the transformer in place. The sum is computed in
    float64 before it is stored.
    """
    for name, delta in adapter.deltas().items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(weight.double() + delta.to(weight.device))


def layers_of(transformer: Any) -> Iterator[tuple[str, Any]]:
    """The modules that have adapters, with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer))


def linear_shapes(transformer: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers, by name."""
    named = transformer.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in named
        if isinstance(layer, torch.nn.Linear)
    }


def selected(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """The module names that equal one of `ends`, or end in a dot and one of `ends`. peft's target_modules
    select the same names.
    """
    ends = tuple(ends)
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)]


def missed(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `ends` that select none of the module names."""
    names = list(names)
    return [end for end in ends if not selected([end], names)]
