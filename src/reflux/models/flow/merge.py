"""Means of models, for a student that starts from the mean of the student's teachers (Flow-OPD's cold start
by merging models, arXiv 2605.08063).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.flow.flow_adapters import Adapter, Factors
from reflux.models.flow.net import FlowNet


def mean_products(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that changes weights by exactly the mean change of these adapters, sum_i scale_i B_i A_i /
    n.

    The LoRA matrices are concatenated, A = [A_1; ...; A_n] and B = [b_1 B_1, ..., b_n B_n], so the rank is
    the sum of the ranks. Where only some adapters have a module, the changes of the others are 0 there. Where
    all scales of a module are equal, the scale is kept (b = 1 / n), so that training continues with the same
    step size.
    """
    count = len(adapters)
    mean = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.factors):
        parts = [adapter.factors[name] for adapter in adapters if name in adapter.factors]
        scale = parts[0].scale if len({part.scale for part in parts}) == 1 else 1.0
        A = torch.cat([part.A for part in parts])
        B = torch.cat([part.B * (part.scale / scale / count) for part in parts], dim=1)
        mean[name] = Factors(A, B, scale)
    return Adapter(mean, _names(adapters))


def mean_factors(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of A and the mean of B separately, as in the released code of Flow-OPD. ModelError where
    modules, ranks or scales differ.

    Its product is NOT the mean of the products, because mean(B) mean(A) has the cross terms B_i A_j. A and B
    are determined only up to an invertible matrix between them, so this mean is useful only for adapters that
    started from the same adapter.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for what, of in (("modules", _modules), ("ranks", _ranks), ("scales (alpha / rank)", _scales)):
            if of(first) != of(other):
                raise ModelError(
                    f"learner.merge: the adapters {first.source} and {other.source} have different {what}, "
                    "so the mean of their LoRA matrices has no meaning. "
                    f'Use by = "weights", which is the mean of their products.'
                )
    return Adapter(
        {name: _mean_pair([adapter.factors[name] for adapter in adapters]) for name in first.factors},
        _names(adapters),
    )


def _mean_pair(parts: Sequence[Factors]) -> Factors:
    return Factors(
        torch.stack([part.A for part in parts]).mean(0),
        torch.stack([part.B for part in parts]).mean(0),
        parts[0].scale,
    )


def _modules(adapter: Adapter) -> set[str]:
    return set(adapter.factors)


def _ranks(adapter: Adapter) -> dict[str, int]:
    return {name: factors.rank for name, factors in adapter.factors.items()}


def _scales(adapter: Adapter) -> dict[str, float]:
    return {name: factors.scale for name, factors in adapter.factors.items()}


def _names(adapters: Sequence[Adapter]) -> str:
    return f"the mean of {', '.join(adapter.source for adapter in adapters)}"


@torch.no_grad()
def mean_weights(models: Iterable[tuple[str, FlowNet]], like: FlowNet) -> dict[str, Tensor]:
    """The mean of all weights and buffers, including the prompt table, in float64. The models are (name,
    net) pairs and are loaded one at a time.

    like: the student's net. ModelError where a model has another configuration than `like`, or other prompts.
    """
    total: dict[str, Tensor] = {}
    count = 0
    for name, net in models:
        _refuse_other(name, net, like)
        for key, value in net.state_dict().items():
            total[key] = total[key].add_(value) if key in total else value.double()
        count += 1
    return {key: value / count for key, value in total.items()}


def _config(net: FlowNet) -> dict[str, Any]:
    """The config as it is on disk, because a config in memory has tuples where a loaded one has lists."""
    return {
        key: value
        for key, value in json.loads(net.transformer.to_json_string()).items()
        if not key.startswith("_")
    }


def _refuse_other(name: str, net: FlowNet, like: FlowNet) -> None:
    theirs, ours = _config(net), _config(like)
    other = [
        f"{key} {theirs.get(key)} instead of {ours[key]}" for key in ours if theirs.get(key) != ours[key]
    ]
    if other:
        raise ModelError(
            f"learner.merge: {name} has another configuration than learner.model ({', '.join(other)}), so "
            "their weights have no mean."
        )
    if (net.prompts and net.prompts.texts) != (like.prompts and like.prompts.texts):
        raise ModelError(
            f"learner.merge: {name} has learned other prompts than learner.model, or the same in another "
            "order, so their weights have no mean."
        )
