"""Checks of a loaded text model on a few tokens: its logits are numbers, depend on earlier tokens only, and
are the product of its hidden states and its head.
"""

from __future__ import annotations

import math

import torch

from reflux.errors import ModelError
from reflux.models.text import HEAD_SHARE, Model, first_line, head_gap
from reflux.models.text_kind import FITS
from reflux.models.weight_files import listed

_INPUTS = "The model needs other inputs than the tokens of a text, or a package that is not installed."
_UNORDERED = "This model cannot be used with deterministic = true on a GPU: leave deterministic out."


def refuse_wrong_logits(model: Model, name: str, path: str) -> None:
    """ModelError where a check fails. name, path: the model and the path of its key in the recipe, for
    errors.
    """
    try:
        (seen, most), (gap, bound) = later_token_gap(model), head_gap(model)
    except Exception as error:
        # The code of a model may fail with any exception.
        raise ModelError(
            f"{path}: the forward pass of {name} over a few tokens failed: {type(error).__name__}: "
            f"{first_line(error)}. {_UNORDERED if 'deterministic' in str(error) else _INPUTS}"
        ) from error
    if math.isnan(seen):
        bad = [key for key, value in model.net.state_dict().items() if not value.isfinite().all()]
        raise ModelError(
            f"{path}: the logits of {name} are not numbers. "
            + (
                f"{len(bad)} of its tensors hold NaN or infinity: {listed(bad)}. Download the weights again."
                if bad
                else "Its weights are finite, so a value overflows: use dtype bfloat16 or float32."
            )
        )
    if seen > most:
        raise ModelError(
            f"{path}: {name} is no causal language model: its logits change by {seen:.3g} where a later "
            f"token changes. {FITS}"
        )
    if not gap <= bound:
        raise ModelError(
            f"{path}: {name} computes its logits from the last hidden states in a way that this library "
            "does not support: the logits differ by "
            f"{gap:.3g}. Use a model of another architecture, or report its name to us."
        )


def later_token_gap(model: Model) -> tuple[float, float]:
    """The largest change of the logits at a position where a later token is replaced by another one, and the
    largest change that rounding explains. The change is 0 for a causal model, and NaN where a logit is not a
    finite number.
    """
    ids_L = torch.arange(min(8, model.vocabulary), device=model.device)
    other_L = torch.cat([ids_L[:-1], ids_L[:1]])
    with torch.no_grad():
        logits_BLV = model.net(input_ids=torch.stack([ids_L, other_L]), use_cache=False).logits[:, :-1]
    share = max(HEAD_SHARE, 8 * torch.finfo(logits_BLV.dtype).eps)
    real_BLV = logits_BLV[..., : model.vocabulary]
    change = float((real_BLV[0] - real_BLV[1]).abs().max())
    return change, share * max(1.0, float(real_BLV.abs().max()))
