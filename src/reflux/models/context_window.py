"""The most tokens that a model can read at once.

Some models switch to other rotary angles at all positions once a batch holds a longer text (longrope of
Phi-3), or stretch the angles with the length (dynamic). The log-prob of an early token then depends on the
tokens after it and on the other rows of the batch, so no sampled log-prob could be computed again. The window
of such a model ends where its angles change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# the keys of model configs that hold the number of positions
_WINDOWS = ("max_position_embeddings", "max_seq_len", "n_positions", "max_target_positions")
# rope types whose angles depend on the longest text of a batch
_BY_LENGTH = ("longrope", "dynamic")


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """The longest text in tokens whose log-probs can be computed again; None without a limit. config: the
    content of a model's config.json (of the text part).
    """
    given = (config.get(name) for name in _WINDOWS)
    # Some configs say -1 for no limit.
    longest = next((int(window) for window in given if window and window > 0), None)
    switches = [
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
        for rope in rope_tables(config)
        if rope.get("rope_type", rope.get("type")) in _BY_LENGTH
    ]
    return min((int(switch) for switch in (longest, *switches) if switch), default=None)


def rope_tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The tables of rotary embeddings: one for the model, or one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        table = config.get(key)
        if isinstance(table, Mapping):
            yield table
            yield from (inner for inner in table.values() if isinstance(inner, Mapping))
