"""Where a model is and in which precision: the words of a recipe, and the device that is here."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from reflux.errors import ModelError

if TYPE_CHECKING:
    import torch

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_DEVICE = re.compile(r"[a-z]+(:\d+)?")


def _long(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    word = value.strip().lower().removeprefix("torch.")
    return _SHORT.get(word, word)


def _device(value: str) -> str:
    word = value.strip().lower()
    if word.partition(":")[0] == "gpu":
        raise ValueError(f'torch calls a GPU "cuda". Write "{word.replace("gpu", "cuda")}"')
    if not _DEVICE.fullmatch(word):
        raise ValueError(f'write "auto", "cpu", "cuda", or "cuda:1" for the second GPU, not "{value}"')
    return word


# The dtype that weights are loaded in. Short names such as bf16 are accepted; the value is the long name.
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_long)]

# "auto", or a device of torch such as "cpu" or "cuda:1".
Device = Annotated[str, AfterValidator(_device)]


def pick_device(device: str) -> str:
    """The device that "auto" is, or the device itself. ModelError for a device that is not here."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f'device = "{device}", but torch finds no GPU. Leave device out, or install a torch built '
            "for CUDA."
        )
    if device == "auto":
        return first_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().split("\n")[0]
        count = torch.cuda.device_count()
        here = f" There are {count} GPUs here, numbered from 0." if device.startswith("cuda") else ""
        raise ModelError(f'device = "{device}" cannot be used: {why}.{here}') from error
    return device


def first_device() -> str:
    """The first GPU, or the CPU where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def autocasts(wanted: str, device: torch.device) -> bool:
    """True if forward passes compute in bfloat16 although the weights are float32: on a GPU, unless the
    recipe's `autocast` (wanted) is "off".
    """
    return wanted == "auto" and device.type == "cuda"


def autocast(wanted: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that forward passes run in; see `autocasts`."""
    import torch

    return torch.autocast("cuda", dtype=torch.bfloat16) if autocasts(wanted, device) else nullcontext()
