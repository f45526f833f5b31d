"""The text length up to which rotary angles do not depend on the text.

Some models switch to other angles at all positions once a batch holds a longer text (longrope of Phi-3), or
stretch the angles with the length (dynamic). The log-prob of an early token then depends on the tokens after
it and on the other rows of the batch, so no sampled log-prob could be computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# rope types whose angles depend on the longest text of a batch
_BY_LENGTH = ("longrope", "dynamic")


def steady_tokens(config: Mapping[str, Any]) -> int | None:
    """The longest text whose angles do not depend on its length, in tokens. None without such a limit.
    config: the content of a model's config.json (of the text part).
    """
    longest = config.get("max_position_embeddings")
    switches = [
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
        for rope in _ropes(config)
        if rope.get("rope_type", rope.get("type")) in _BY_LENGTH
    ]
    return min((int(switch) for switch in switches if switch), default=None)


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The tables of rotary embeddings: one for the model, or one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        table = config.get(key)
        if isinstance(table, Mapping):
            yield table
            yield from (inner for inner in table.values() if isinstance(inner, Mapping))
