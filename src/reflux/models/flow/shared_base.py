"""One base model shared by several adapters. The base is loaded once, and the rows of one call may have
different adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count, cycle, islice
from typing import Any

import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.flow.adapter_files import read_adapter
from reflux.models.flow.flow_adapters import attach, layers_of, switch_off
from reflux.models.flow.flow_model import FlowModel, copies
from reflux.models.flow.load import load_flow
from reflux.models.flow.net import UNCONDITIONAL
from reflux.models.flow.row_adapters import row_adapters
from reflux.models.locations import locate
from reflux.models.placement import pick_device
from reflux.models.shared_cache import SharedCache

# times of the states that a new adapter is tested on
PROBE_T = (1.0, 0.75, 0.5, 0.25)
# largest side of such a state, in patches
PROBE_PATCHES = 8
# the prompts of such a test where the model has no prompt table
PROBE_TEXTS = (UNCONDITIONAL, "a photograph")


class SharedBase:
    """A model and the adapters on it, all of which are switched off outside of a call of `velocity`."""

    def __init__(self, model: FlowModel):
        self.model = model
        # names of the tested adapters on the transformer, by their source
        self._names: dict[str, str] = {}
        self._numbers = count()
        # the layers of the transformer that have adapters
        self._layers: list[Any] = []
        self._turn = threading.Lock()

    @classmethod
    def of(cls, name: str, path: str, *, dtype: str, device: str, shared_cache: SharedCache) -> SharedBase:
        """The run's only copy of this model in this dtype on this device, frozen. path: the path of the key
        in the recipe, for errors.
        """

        def load() -> SharedBase:
            model = load_flow(name, path, dtype=dtype, device=device, shared_cache=shared_cache)
            model.net.requires_grad_(False).eval()
            return cls(model)

        return shared_cache(("flow base", locate(name, path), dtype, pick_device(device)), load)

    def voice(self, adapter: str | None, path: str) -> Voice:
        """The model with this adapter, or without any. path: the path of the key in the recipe, for errors.
        ModelError for an adapter that does not fit, or that changes no velocity.
        """
        if adapter is not None and adapter not in self._names:
            self._add(adapter, path)
        of_model = {field.name: getattr(self.model, field.name) for field in fields(FlowModel)}
        return Voice(**of_model, base=self, adapter=None if adapter is None else self._names[adapter])

    def _add(self, adapter: str, path: str) -> None:
        transformer, name = self.model.net.transformer, f"adapter{next(self._numbers)}"
        read = read_adapter(adapter, transformer, path)
        with self._turn:
            attach(transformer, read, name)
            switch_off(transformer)
            self._layers = [layer for _, layer in layers_of(transformer)]
        if torch.equal(self._probe(name), self._probe(None)):
            raise ModelError(
                f"{path}: the adapter in {adapter} does not change the velocities of the model, so this "
                "teacher would be the base model. "
                f"Check whether its LoRA matrices B are still 0, as before the first step of training."
            )
        self._names[adapter] = name

    @torch.inference_mode()
    def _probe(self, name: str | None) -> Tensor:
        """Velocities at some seeded states."""
        config = self.model.net.transformer.config
        side = min(config.sample_size, PROBE_PATCHES * config.patch_size)
        rng = torch.Generator().manual_seed(0)
        x_ND = torch.randn(len(PROBE_T), self.model.channels * side**2, generator=rng)
        table = self.model.net.prompts
        texts = list(islice(cycle(PROBE_TEXTS if table is None else table.texts), len(PROBE_T)))
        return self.velocity(x_ND, torch.tensor(PROBE_T), texts, 1.0, [name] * len(texts))

    def velocity(
        self,
        x_ND: Tensor,
        t_N: Tensor,
        texts: Sequence[str],
        guidance: float,
        adapters_N: Sequence[str | None],
    ) -> Tensor:
        """v_ND as `FlowModel.velocity` gives it, each row by the model with its own adapter; None: without
        any. All rows go through the base in one call. A lock lets one thread at a time call.
        """
        with self._turn, row_adapters(self._layers, [*adapters_N] * copies(guidance)):
            return self.model.velocity(x_ND, t_N, texts, guidance)


@dataclass(frozen=True)
class Voice(FlowModel):
    """A shared base with one adapter or none. It is used as any other flow model, but must not be saved."""

    base: SharedBase
    # the adapter's name on the base; None for no adapter
    adapter: str | None

    def velocity(self, x_ND: Tensor, t_N: Tensor, texts: Sequence[str], guidance: float = 1.0) -> Tensor:
        return self.base.velocity(x_ND, t_N, texts, guidance, [self.adapter] * len(texts))

    def macs(self, guidance: float = 1.0, pixels: int = 0) -> int:
        """Multiply-accumulates of one velocity by the base and this adapter, without the other adapters."""
        sizes = {name: parameter.numel() for name, parameter in self.net.transformer.named_parameters()}
        own = sum(size for name, size in sizes.items() if ".lora_" not in name or f".{self.adapter}." in name)
        return super().macs(guidance, pixels) * own // sum(sizes.values())
