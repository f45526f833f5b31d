"""A LoRA student as adapters in a vLLM server: one name for each version, so that requests in flight finish
with the adapter that they began with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reflux.errors import ModelError
from reflux.samplers.vllm_weights import FileDelivery, ServedAdapter, saved

if TYPE_CHECKING:
    from reflux.engines.vllm_server import VLLMServer
    from reflux.runtime.weights import Weights

# Versions that a server can still be asked for, at least. Requests of earlier steps may be in flight or wait.
_KEPT = 4


class AdapterDelivery:
    """merged: the way of students whose adapter the server cannot compute. max_staleness: of the run; turns
    that began so many versions ago may still name theirs.
    """

    def __init__(self, folder: Path, merged: FileDelivery, max_staleness: int = 0):
        self.folder, self.merged = folder, merged
        self._most = max(_KEPT, max_staleness + 2)
        self.adapter: ServedAdapter | None = None
        # the adapters in the folder, the newest last
        self._kept: list[ServedAdapter] = []

    def take(self, weights: Weights) -> None:
        adapter = weights.adapter
        if adapter is None:
            self._kept = []
            self.merged.take(weights)
            return
        if self.merged.version is not None:
            raise ModelError(
                "sampler: the server has merged weights, and an adapter belongs to the weights that it "
                "started with. Remove sampler.lora_rank, so that the student is always sent merged."
            )
        taken = ServedAdapter(f"reflux-version{weights.version}", weights.version)
        folder = self.folder / taken.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tensors = {
            name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, value in adapter.read()
        }
        saved(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(dict(adapter.config)))
        self._kept = [*(kept for kept in self._kept if kept != taken), taken]

    async def give(self, server: VLLMServer) -> None:
        """Requests name the new adapter as soon as the server has it."""
        if not self._kept:
            await self.merged.give(server)
            self.adapter = None
            return
        newest = self._kept[-1]
        await server.load_adapter(newest.name, self.folder / newest.name)
        self.adapter = newest
        while len(self._kept) > self._most:
            oldest = self._kept.pop(0)
            await server.forget_adapter(oldest.name)
            shutil.rmtree(self.folder / oldest.name, ignore_errors=True)
