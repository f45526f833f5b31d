"""A student whose weights are divided among ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each layer is gathered before it computes and given back afterwards. The embeddings, the last norm and the
output head (the matrix that maps hidden states to logits) are one further unit, the root: it is gathered for
a whole pass, so the loss reads the head as in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from reflux.errors import ModelError, RunError
from reflux.learners.rank_group import RankGroup
from reflux.models.compiled import layers_of
from reflux.models.dtensors import divided
from reflux.models.text_rows import TextRows, padded
from reflux.storage import checkpoints

if TYPE_CHECKING:
    from reflux.loss.batch import Item
    from reflux.models.text import Model

Value = TypeVar("Value")


class Root(nn.Module):
    """The unit around all others. The model itself keeps its class, which an export names."""

    def __init__(self, model: Model):
        super().__init__()
        self.net = model.net
        # The trunk is a part of the net and must not be registered twice.
        self.trunk = [model.trunk]

    def forward(self, texts: TextRows, rows_N: Tensor) -> Tensor:
        return texts.states(self.trunk[0])[rows_N]


class Shards:
    """`Ranks` of a group of processes."""

    shared = True

    def __init__(self, group: RankGroup):
        self.group, self.leads = group, group.leads
        self._roots: list[FSDPModule] = []

    def divide(self, model: Model, narrow: bool) -> None:
        layers = layers_of(model.net)
        if not layers:
            raise ModelError(
                f"learner.kind = 'fsdp': the layers of {type(model.net).__name__} are not of the class by "
                "which transformers marks layers, so they cannot be divided. Use learner.kind = 'hf'."
            )
        mesh = init_device_mesh(self.group.device.type, (self.group.size,))
        wide = next(model.net.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if narrow else None, reduce_dtype=wide)
        root = Root(model)
        for module in (*layers, root):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self._roots = [cast(FSDPModule, root)]
        # FSDP takes the first unit that computes for the root.
        with torch.no_grad():
            root(padded([np.zeros(1, dtype=np.int64)], self.group.device), torch.zeros(1, dtype=torch.int64))
        self.rest()

    def states(self, model: Model, texts: TextRows, rows_N: Tensor) -> Tensor:
        return cast(Root, self._roots[0])(texts, rows_N)

    def gather(self) -> None:
        for root in self._roots:
            root.unshard()

    def rest(self) -> None:
        for root in self._roots:
            root.reshard()

    def passes(self, parts: Iterator[list[Item]]) -> Iterator[list[Item]]:
        mine = list(parts)
        most = max(self.together(len(mine)))
        return iter(mine + [[] for _ in range(most - len(mine))])

    def counts(self, counts_C: np.ndarray) -> np.ndarray:
        return np.sum(self.together(counts_C), axis=0)

    def together(self, value: Value) -> list[Value]:
        return self.group.together(value)

    @torch.no_grad()
    def add_up(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                # FSDP has made the mean over the ranks.
                parameter.grad.mul_(self.group.size)

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Every rank writes its parts as safetensors. Rank 0 writes the values that are not tensors."""
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if self.leads:
            checkpoints.write(folder, {key: value for key, value in state.items() if key not in tensors})
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=self.group.messages)

    def load(self, folder: Path, like: Mapping[str, Tensor]) -> dict[str, Any]:
        """Every rank reads its parts, also of a checkpoint of another number of ranks."""
        reader = HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        if not found:
            raise RunError(
                f"{folder} has no tensors. Remove {folder.parent}; --resume then continues from the previous "
                "checkpoint, if there is one."
            )
        tensors = {key: _empty(entry, like[key.split("/", 1)[1]]) for key, entry in found.items()}
        state_dict_loader.load(tensors, storage_reader=reader, process_group=self.group.messages)
        return {**checkpoints.read_plain(folder), **tensors}


def _empty(entry: Any, parameter: Tensor) -> Tensor:
    """A tensor for an entry of a checkpoint: divided as the parameter it belongs to, or plain, as Adam's
    count of steps, which every rank has.
    """
    whole = divided(parameter)
    if whole is not None and entry.size == whole.shape:
        return torch.empty_like(parameter, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=parameter.device)
