"""Low-rank adapters by peft: attach, merge by product, export. A model without adapters is not changed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.dtensors import divided, gathered
from reflux.models.generation_file import write_end_ids
from reflux.models.text import Model

if TYPE_CHECKING:
    from reflux.models.settings import Lora


def attach(model: Model, lora: Lora, seed: int) -> None:
    """Freeze the model and inject new LoRA adapters in place, with random numbers from the seed. The trunk
    and output head objects of the model stay the same.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    model.net.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 63))
        settings = LoraConfig(
            r=lora.rank,
            # peft divides lora_alpha by the rank and accepts fractions, although its type is int.
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=targets,
            exclude_modules=_no_matrices(model.net) if targets == "all-linear" else None,
            task_type="CAUSAL_LM",
        )
        known = sorted(_linear_names(model.net))
        try:
            inject_adapter_in_model(settings, model.net)
        except (ValueError, re.error) as error:
            raise ModelError(
                f"learner.lora.targets: {error} The model's linear modules are called {', '.join(known)}."
            ) from error
    _refuse_tied(model.net)


@torch.no_grad()
def _no_matrices(net: Any) -> list[str] | None:
    """The last parts of the names of linear modules that do not act as a matrix, such as routers that return
    several values. An adapter of peft would call them as plain matrices. None if there are none.
    """
    odd: set[str] = set()

    def look(name: str, module: torch.nn.Linear, given: tuple[Any, ...], made: Any) -> None:
        plain = isinstance(made, Tensor) and made.shape == (*given[0].shape[:-1], module.out_features)
        if not plain or given[0].shape[-1] != module.in_features:
            odd.add(name.rpartition(".")[2])

    hooks = [
        module.register_forward_hook(partial(look, name))
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
    ]
    if hooks:
        net(input_ids=torch.arange(4, device=net.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(odd) or None


def _linear_names(net: Any) -> set[str]:
    """The last parts of the names of all linear modules."""
    return {
        name.rpartition(".")[2] for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)
    }


def _refuse_tied(net: Any) -> None:
    """Raise ModelError for an adapter on one of two modules that share a matrix. Merged, it would change
    both modules in the sampler, but only one in the learner.
    """
    inputs, outputs = net.get_input_embeddings(), net.get_output_embeddings()
    base = [getattr(module, "base_layer", module) for module in (inputs, outputs)]
    adapted = [
        name
        for name, module in (("the input embeddings", inputs), ("the output head", outputs))
        if module in _layers(net).values()
    ]
    if adapted and base[0].weight is base[1].weight:
        raise ModelError(
            f"learner.lora.targets puts an adapter on {' and '.join(adapted)}, but this model shares one "
            "matrix between its input embeddings and its output head, and they would no longer be equal. "
            'Leave both out (targets = "all-linear" does so), or train without lora.'
        )


def _layers(net: Any) -> dict[str, Any]:
    # Importing peft takes half a second. A model has adapters only if something has imported it.
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None:
        return {}
    # A module that several layers share has several names, and each of them is a name of its weights.
    named = net.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, lora.LoraLayer)}


def base_parameters(net: Any) -> dict[str, Tensor]:
    """The parameters by the model's own names, without the adapters. For an adapted weight it is the frozen
    base weight. A shared parameter is listed under all its names.
    """
    named = net.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer", ""): parameter for name, parameter in named if ".lora_" not in name}


def refuse_narrow(name: str, base_parameter: Tensor) -> Tensor:
    """Return the parameter called `name` unchanged. ModelError where the parameter is quantised or narrower
    than float32, because rounding would then lose small updates.
    """
    if base_parameter.dtype not in (torch.float32, torch.float64):
        kind = str(base_parameter.dtype).removeprefix("torch.")
        why = (
            "quantised"
            if not base_parameter.dtype.is_floating_point
            else "too imprecise for updates of the size of a training step"
        )
        raise ModelError(
            f"{name} is stored in {kind}, which is {why}. Reading and writing weights needs float32 master "
            "weights."
        )
    return base_parameter


def merged(net: Any, only: Collection[str] | None = None) -> Mapping[str, Tensor]:
    """The result of `full_weights` as one dictionary by name."""
    return dict(full_weights(net, only))


@torch.no_grad()
def full_weights(net: Any, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers (or `only` these) under the model's own names. An adapted weight includes
    scale * B A, the change by its LoRA matrices. Weights that are divided among processes are gathered, one
    after the other.
    """
    adapted = dict(_adapted(net))
    for name, value in net.state_dict().items():
        plain = name.replace(".base_layer", "")
        if ".lora_" in name or (only is not None and plain not in only):
            continue
        if layer := adapted.get(plain):
            value = value + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield plain, gathered(value)


def _adapted(net: Any) -> Iterator[tuple[str, Any]]:
    """(name of the parameter in the model without adapters, its adapter). The experts of a mixture are
    parameters of one module, and each of them has an adapter of its own around the module.
    """
    for name, layer in _layers(net).items():
        yield f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}", layer


def adapter_config(net: Any) -> dict[str, Any] | None:
    """The content of adapter_config.json for the adapter of a net. None where it has none, and where other
    programs may not compute it: an adapter around something else than a linear module, or several at once.
    """
    layers = _layers(net)
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None or not layers or any(type(layer) is not lora.Linear for layer in layers.values()):
        return None
    active = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(active) != 1 or len(only := active.pop()) != 1:
        return None
    (adapter,), first = only, next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.r[adapter],
        "lora_alpha": first.lora_alpha[adapter],
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
    }


def adapter_tensors(net: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each matrix of the adapter, by the names that peft writes to files. Matrices that are
    divided among processes are gathered, one after the other.
    """
    for name, layer in _layers(net).items():
        (adapter,) = layer.active_adapters
        for part, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            yield f"base_model.model.{name}.{part}.weight", gathered(matrices[adapter].weight.detach())


def weight_bytes(net: Any) -> dict[str, int]:
    """The bytes of each full weight, by the names of `full_weights`, in its order."""
    return {
        name.replace(".base_layer", ""): value.numel() * value.element_size()
        for name, value in net.state_dict().items()
        if ".lora_" not in name
    }


def _shared_again(net: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, in which the names of one parameter have one tensor, as transformers expects on saving.
    Each name was gathered by itself.
    """
    firsts: dict[int, str] = {}
    named = base_parameters(net).items()
    owners = {name: firsts.setdefault(id(parameter), name) for name, parameter in named}
    return {name: weights[owners.get(name, name)] for name in weights}


def export(model: Model, folder: Path, writes: bool = True) -> None:
    """Save the merged student in Hugging Face format, in the dtype that its files had. writes: False in a
    process that only takes part in gathering weights that are divided among processes.
    """
    net, dtype = model.net, model.stored_dtype or torch.float32
    # A student that is divided may not fit into the memory of one device.
    apart = divided(next(net.parameters())) is not None
    place = "cpu" if apart else None
    weights = {name: value.to(place, dtype) for name, value in full_weights(net) if writes}
    if not writes:
        return
    if apart:
        weights = _shared_again(net, weights)
    net.save_pretrained(folder, state_dict=weights)
    # save_pretrained writes float32, the dtype of the master weights, into config.json.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
    write_end_ids(net.generation_config, model.end_ids, folder)
    model.tokenizer.save_pretrained(folder)
