"""Checks that the weights which a library loaded are exactly the weights of the model.

transformers and diffusers fill a tensor that the files lack with random numbers, leave out a tensor that the
model does not have, and only log both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from reflux.errors import ModelError
from reflux.models.weight_files import listed

# Buffers that earlier versions of transformers stored, and prediction heads for tokens further ahead.
_BESIDE = re.compile(r"(^|[._])mtp|masked_bias$|inv_freq$|position_ids$")
# what torch.compile and data-parallel wrappers put before the names of tensors
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")


def refuse_other_weights(
    net: Any, info: Mapping[str, Any], name: str, path: str, partial: bool = False
) -> None:
    """ModelError that lists the tensors that the files lack, that have another shape, or that the model does
    not have.

    info: the result of `from_pretrained(..., output_loading_info=True)`, from which the libraries have
    removed the names that a model declares as left out on purpose. name: the model. path: the path of the
    key in the recipe. partial: the net is the text model of a larger one. Then only tensors that are named
    as the net's own up to numbers, such as a further layer, are tensors too many.
    """
    extra = [key for key in info["unexpected_keys"] if not _is_known(net, key)]
    if partial:
        own = {_numberless(key) for key in net.state_dict()}
        extra = [key for key in extra if _numberless(key) in own]
    shapes = [
        f"{key} ({list(stored)} in the file, {list(wanted)} by its config)"
        for key, stored, wanted in info["mismatched_keys"]
    ]
    faults = [
        *_fault("lack", info["missing_keys"]),
        *_fault("hold in another shape", shapes),
        *_fault("hold beside the model's own", extra),
    ]
    if faults:
        raise ModelError(
            f"{path}: the weight files of {name} are not those of its config.json. They "
            f"{'; they '.join(faults)}. {_remedy(extra)}"
        )


def _fault(what: str, names: Iterable[str]) -> Iterable[str]:
    if kept := list(names):
        yield f"{what} {len(kept)} tensors: {listed(kept)}"


def _remedy(extra: list[str]) -> str:
    prefix = next((wrap for wrap in _WRAPPERS if any(key.startswith(wrap) for key in extra)), None)
    if prefix:
        return f"The names begin with {prefix}: save the model without its wrapper."
    return "Use files and a config.json that were saved together."


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _is_known(net: Any, key: str) -> bool:
    """True for what good files may hold beside the model's own tensors: a table that the net computes itself,
    such as a causal mask in older files, and heads that predict tokens further ahead.
    """
    if _BESIDE.search(key) or any(key.endswith(name) for name, _ in net.named_buffers()):
        return True
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    first = getattr(net.config, "num_hidden_layers", 0)
    ahead = getattr(net.config, "num_nextn_predict_layers", None) or 0
    return layer is not None and first <= int(layer[1]) < first + ahead
