"""Whether a model can continue texts with a cache of transformers, and under which argument it takes it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from reflux.models.text import Model


def cache_argument(model: Model) -> str | None:
    """The argument of the trunk's forward pass that takes a cache of transformers. None if the model keeps
    its state elsewhere (in a cache class of its own, or in its modules), or if it would count padding on the
    left as positions.
    """
    net, names = model.net, inspect.signature(model.trunk.forward).parameters
    if not type(net)._supports_default_dynamic_cache():
        return None
    # A model with a recurrent state has layers for this state in its cache, unless its modules hold it.
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache_layers(net.config))
    if net._is_stateful and not recurrent:
        return None
    if "cache_params" in names:
        return "cache_params"
    # Positions are given, or alibi computes distances from the mask.
    placed = "position_ids" in names or any("alibi" in name for name in dir(model.trunk))
    return "past_key_values" if placed and "past_key_values" in names else None


def cache_layers(config: Any) -> list[Any]:
    """The layers of a cache of transformers for a model; empty where its config does not say which."""
    try:
        return DynamicCache(config=config).layers
    except AttributeError:
        # The models of such configs have a cache class of their own.
        return []
