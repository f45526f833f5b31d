"""Prepares a flow's student for training: it starts from its own weights, from the mean of its teachers or
from an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reflux.errors import ModelError
from reflux.models.flow import flow_adapters
from reflux.models.flow.adapter_files import read_adapter
from reflux.models.flow.adapter_folders import adapter_folder
from reflux.models.flow.flow_adapters import Adapter
from reflux.models.flow.load import load_net
from reflux.models.flow.merge import mean_factors, mean_products, mean_weights

if TYPE_CHECKING:
    from reflux.models.flow.flow_model import FlowModel
    from reflux.models.settings import FlowLora, Merge


def start(
    model: FlowModel, merge: Merge | None, adapter: str | None, lora: FlowLora | None, seed: int
) -> bool:
    """Prepare `model.net` in place. merge, adapter, lora: the learner's settings of these names. Afterwards
    the trained parameters are those that require a gradient. Returns True if the trained parameters are an
    adapter on the unchanged model.

    Without lora all weights are trained, including the prompt table, and an adapter is first added to them.
    With lora everything is frozen except one adapter. It is a new adapter from the seed, or the adapter that
    the student starts from. In the second case `lora` has to describe that adapter, else ModelError with the
    differences. With `merge`, the mean of full models becomes the base model in both cases; the mean of
    adapters is one adapter.
    """
    net = model.net
    begin = _adapter(model, merge, adapter)
    if lora is None:
        if begin is not None:
            flow_adapters.add(net.transformer, begin)
        net.requires_grad_(True)
        return False
    net.requires_grad_(False)
    if begin is None:
        flow_adapters.attach_fresh(net.transformer, lora, seed)
    else:
        _refuse_other(begin, lora, net.transformer)
        flow_adapters.attach(net.transformer, begin, flow_adapters.TRAINED)
    return merge is None or begin is not None


def _adapter(model: FlowModel, merge: Merge | None, adapter: str | None) -> Adapter | None:
    """The adapter to start from, if any. The mean of full models is written into the net here."""
    if adapter is not None:
        return read_adapter(adapter, model.net.transformer, "learner.adapter")
    if merge is None:
        return None
    paths = {name: f"learner.merge.models[{i}]" for i, name in enumerate(merge.models)}
    kinds = {name: adapter_folder(name, path) is not None for name, path in paths.items()}
    if all(kinds.values()):
        read = [read_adapter(name, model.net.transformer, paths[name]) for name in merge.models]
        return mean_products(read) if merge.by == "weights" else mean_factors(read)
    if any(kinds.values()):
        whole = [name for name, is_adapter in kinds.items() if not is_adapter]
        raise ModelError(
            f"learner.merge.models: {', '.join(whole)} is a full model and the others are adapters. Merge "
            "models of one kind only."
        )
    if merge.by == "factors":
        raise ModelError(
            'learner.merge: by = "factors" is for adapters, and these are full models. Use by = "weights".'
        )
    model.net.load_state_dict(
        mean_weights(((name, load_net(name, paths[name])) for name in merge.models), model.net)
    )
    return None


def _refuse_other(begin: Adapter, lora: FlowLora, transformer: Any) -> None:
    """Raise ModelError where lora does not describe this adapter. Training continues with the adapter's own
    LoRA matrices, so a different `lora` table would be ignored.
    """
    for name, factors in begin.factors.items():
        if factors.rank != lora.rank or abs(factors.scale * factors.rank - lora.alpha) > 1e-6 * lora.alpha:
            raise ModelError(
                f"learner.lora has rank {lora.rank} and alpha {lora.alpha:g}, but the adapter that training "
                "continues with "
                f"({begin.source}) has rank {factors.rank} and alpha {factors.scale * factors.rank:g} at "
                f"{name}. Give the same values, or leave "
                f"lora out: the adapter is then merged into the base weights."
            )
    asked, moved = (
        set(flow_adapters.selected(lora.targets, flow_adapters.linear_shapes(transformer))),
        set(begin.factors),
    )
    for names, what in (
        (moved - asked, "leaves out {}, which the adapter adapts"),
        (asked - moved, "includes {}, which the adapter does not adapt"),
    ):
        if names:
            raise ModelError(
                f"learner.lora.targets {what.format(min(names))}: the adapter that training continues with "
                f"({begin.source}) keeps its own "
                "modules. Change targets to match exactly the modules of this adapter, or leave lora out: "
                "the adapter is then merged into the base weights."
            )
