"""The device of the test suite: what REFLUX_TEST_DEVICE names ("cuda", "cuda:1"), or else the CPU. "standin"
is a device for machines without a GPU (standin.py).

Bounds of the tests hold for float32 with neither autocast nor TF32, which the suite switches off, or for
float64 where a test computes in it. A bound for another precision is named by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

DEVICE = os.environ.get("REFLUX_TEST_DEVICE", "cpu")
ON_GPU = DEVICE.startswith("cuda")
if DEVICE == "standin":
    # Here, so that it is also in the processes that tests start.
    import standin

    standin.install()


def here(values: Any) -> Any:
    """A module, or numbers (a tensor, an array or a list) as a tensor, on the device of the suite."""
    import torch

    return (values if isinstance(values, torch.nn.Module) else torch.as_tensor(values)).to(DEVICE)


def exactly(shipped: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which a run of the recipe `shipped` computes in float32 on a GPU and repeats bit for bit.
    named: settings of the run's own, by dotted keys.
    """
    if DEVICE == "cpu":
        return {}
    parts = {"learner": shipped.learner} | {f"teachers.{name}": t for name, t in shipped.teachers.items()}
    narrow = {path for path, part in parts.items() if "autocast" in {field.name for field in fields(part)}}
    kept = {path for path in narrow if not {path, f"{path}.kind"} & set(named)}
    settings: dict[str, Any] = {f"{path}.autocast": "off" for path in kept}
    return settings | {"deterministic": named.get("sampler.turns") != "ready"}
