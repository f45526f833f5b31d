"""Makes a plain model of a net that transformers has loaded from a GGUF file."""

from __future__ import annotations

from typing import Any

from reflux.models.gguf_header import GgufHeader, is_gguf, read_gguf
from reflux.models.gguf_kind import refuse_unread
from reflux.models.parameters import parameter_count


def plain_net(net: Any, header: GgufHeader, name: str, path: str) -> Any:
    """A net of the same class with the same weights, which can be trained and saved: transformers refuses to
    save the net that it has loaded from a GGUF file.

    name: the model; path: the path of its key in the recipe, for errors. ModelError where transformers has
    left out settings or weights of the file.
    """
    refuse_unread(header, net.config, parameter_count(net), name, path)
    config = net.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.name_or_path = name
    place = getattr(net, "hf_device_map", None)
    weights = net.state_dict()
    return type(net).from_pretrained(
        None, config=config, state_dict=weights, dtype=net.dtype, device_map=place
    )


def notes_on(where: str, name: str) -> tuple[str, ...]:
    """What a user must know of the weights of a model: that those of a GGUF file are dequantised. where: the
    file or folder; name: the model as the recipe names it.
    """
    if not is_gguf(where) or not (kinds := read_gguf(where, name).quantised):
        return ()
    return (
        f"{name} is quantised ({', '.join(kinds)}). It is dequantised, and a student is saved in float32.",
    )
