"""Low-rank adapters on a flow's transformer: in memory, attached by peft, switched, and added to the weights
(arXiv 2106.09685).

An adapter is a pair of factors per linear layer, and moves its weight by scale * B A. Several may sit on one
transformer; at most one of them speaks at a time. Modules are named as inside the transformer
("transformer_blocks.0.attn.to_q").
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
    """One linear layer's: weight + scale * B A."""

    # [rank, inputs]
    A: Tensor
    # [outputs, rank]
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)

    def delta(self) -> Tensor:
        """scale * B A, [outputs, inputs], float64: a product of factors loses nothing of them."""
        return self.scale * (self.B.detach().double() @ self.A.detach().double())


@dataclass(frozen=True)
class Adapter:
    """Factors by module name. `source` says in errors where they came from."""

    factors: Mapping[str, Factors]
    source: str

    def deltas(self) -> dict[str, Tensor]:
        """What it adds to the weight of each module, float64."""
        return {name: factors.delta() for name, factors in self.factors.items()}


def lora_config(adapter: Adapter) -> Any:
    """The peft LoraConfig that these factors were, or might have been, trained under; modules by their full
    names.
    """
    from peft import LoraConfig

    ranks = {name: factors.rank for name, factors in adapter.factors.items()}
    alphas = {name: factors.scale * factors.rank for name, factors in adapter.factors.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - peft divides it by the rank, and takes fractions
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank},
        alpha_pattern={f"^{re.escape(name)}": other for name, other in alphas.items() if other != alpha},
    )


def attach(transformer: Any, adapter: Adapter, name: str) -> None:
    """Put these factors on the transformer in place, as its adapter `name` (no dots), which then speaks and
    may be trained.
    """
    from peft import inject_adapter_in_model

    # peft reads the names alone
    keys = {f"{module}.lora_A.weight": factors.A for module, factors in adapter.factors.items()}
    with warnings.catch_warnings():
        # several adapters on one model are meant
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(lora_config(adapter), transformer, name, state_dict=keys)
    layers = dict(layers_of(transformer))
    with torch.no_grad():
        for module, factors in adapter.factors.items():
            layers[module].lora_A[name].weight.copy_(factors.A)
            layers[module].lora_B[name].weight.copy_(factors.B)
            # alpha / rank would round
            layers[module].scaling[name] = factors.scale


def attach_fresh(transformer: Any, lora: FlowLora, seed: int) -> None:
    """A new adapter to be trained: A from seeded random numbers, B = 0, so the model says what it said.
    ModelError where a target is no module.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))  # pyright: ignore[reportArgumentType]
    lost = missed(lora.targets, linear_shapes(transformer))
    if lost:
        raise ModelError(
            f"learner.lora.targets: no linear layer of this transformer is called {', '.join(lost)}. Leave "
            "that out."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 63))
        inject_adapter_in_model(config, transformer, TRAINED)


def taken(transformer: Any, name: str = TRAINED) -> Adapter:
    """The factors of an adapter that sits on a transformer: its very tensors."""
    found = ((module, layer) for module, layer in layers_of(transformer) if name in layer.scaling)
    factors = {
        m: Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for m, layer in found
    }
    return Adapter(factors, name)


def use(transformer: Any, name: str | None) -> None:
    """Let this adapter speak, and no other; None: the base model alone, bit for bit as without adapters. All
    of them are frozen.
    """
    for _, layer in layers_of(transformer):
        layer.set_adapter([] if name is None else [name], inference_mode=True)


@torch.no_grad()
def add(transformer: Any, adapter: Adapter) -> None:
    """Add scale * B A to the weights in place; float64 until the sum is stored."""
    for name, delta in adapter.deltas().items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(weight.double() + delta.to(weight.device))


def layers_of(transformer: Any) -> Iterator[tuple[str, Any]]:
    """The modules that carry adapters."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer))


def linear_shapes(transformer: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the plain linear layers, by name."""
    named = transformer.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in named
        if isinstance(layer, torch.nn.Linear)
    }


def selected(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that are one of these, or end in one of these behind a dot: what peft's target_modules
    select.
    """
    ends = tuple(ends)
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)]


def missed(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those ends that no name has."""
    names = list(names)
    return [end for end in ends if not selected([end], names)]
