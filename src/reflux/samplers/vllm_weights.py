"""The student's weights as files for a server: compared with the files of the model that the server has
loaded, and written to shared memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.head_files import HEADS
from reflux.models.weight_files import listed, read_header, read_json, weight_files

if TYPE_CHECKING:
    from reflux.engines.vllm_server import VLLMServer
    from reflux.runtime.weights import Weights

Shape = tuple[int, ...]
# bytes of one file; the server reads one file at a time
FILE_BYTES = 2 << 30
_SHARED_MEMORY = Path("/dev/shm")
# tables that some old files hold and that no program loads
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class ServedAdapter:
    """The adapter that requests name, and the version of its weights."""

    name: str
    version: int


class Delivery(Protocol):
    """The way of weights to a server."""

    @property
    def adapter(self) -> ServedAdapter | None:
        """What requests name; None for the served model itself."""
        ...

    def take(self, weights: Weights) -> None:
        """Keep these weights for `give`. ModelError where they do not fit the server; nothing is sent."""
        ...

    async def give(self, server: VLLMServer) -> None:
        """Put the weights that were taken last into the server, as often as it is called. ServerError if the
        server does not take them; its model may then be broken.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """The names and shapes that a server expects."""

    shapes: Mapping[str, Shape]
    # True if the output head is the input embedding, and may be given a second time under its own name
    tied: bool

    @classmethod
    def of(cls, folder: Path) -> Layout:
        """From the headers of the model's files. No weights are read."""
        where = "sampler"
        config = read_json(folder / "config.json", where)
        text = config.get("text_config") or {}
        shapes = {
            name: tuple(entry["shape"])
            for file in weight_files(folder, where)
            for name, entry in read_header(file, where).items()
            if _COMPUTED not in name
        }
        return cls(shapes, bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))))

    def matching(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the server expects, each once. ModelError, at the end at the latest, where a name
        is missing or not known, or a shape differs.
        """
        missing = dict(self.shapes)
        for name, value in weights.tensors():
            shape = tuple(value.shape)
            if name not in self.shapes:
                if self.tied and name.endswith(HEADS) and shape in self.shapes.values():
                    continue
                raise self._refused(f"the learner's {name} is not in its files")
            if shape != self.shapes[name]:
                raise self._refused(f"{name} is {shape} in the learner and {self.shapes[name]} in its files")
            del missing[name]
            yield name, value
        if missing:
            raise self._refused(f"the learner has no {listed(missing)}")

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"sampler: the server cannot get the learner's weights, because {why}. Nothing was sent. Start "
            'the server with the student\'s own files, or use sampler.kind = "hf", which needs no files.'
        )


class FileDelivery:
    """Weights as files of one version in a folder of this run."""

    # requests name the served model itself
    adapter: ServedAdapter | None = None

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, file_bytes: int = FILE_BYTES):
        self.folder, self.layout, self.dtype, self.file_bytes = folder, layout, dtype, file_bytes
        self.files: list[Path] = []
        # of the weights in the files; None before the first ones
        self.version: int | None = None

    def take(self, weights: Weights) -> None:
        """Write the weights in place of the ones before. ModelError where they do not fit the server."""
        for old in self.files:
            old.unlink()
        self.files, self.version = [], None
        part: dict[str, Tensor] = {}
        size = 0
        for name, value in self.layout.matching(weights):
            # A copy, because two names may share memory, which the file format refuses.
            part[name] = value.detach().to("cpu", self.dtype, copy=True).contiguous()
            size += part[name].nbytes
            if size >= self.file_bytes:
                self._save(part, weights.version)
                part, size = {}, 0
        if part:
            self._save(part, weights.version)
        self.version = weights.version

    async def give(self, server: VLLMServer) -> None:
        if self.version is None:
            # What a server has loaded at its start are the student's weights of version 0.
            await server.label(0)
        else:
            await server.load_files(self.files, self.version)

    def _save(self, part: Mapping[str, Tensor], version: int) -> None:
        file = self.folder / f"version{version}-{len(self.files)}.safetensors"
        self.files.append(file)
        saved(part, file)


def saved(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file. ModelError, with the remedy, where there is no room for it."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except Exception as error:
        # safetensors reports a full disk with its own exception.
        free = shutil.disk_usage(file.parent).free
        raise ModelError(
            f"sampler: the weights cannot be written to {file.parent} ({error}), which has "
            f"{free / 1e9:.2g} GB left. Set sampler.weights_folder to a folder with more."
        ) from error


@contextmanager
def shared_folder(place: str | None) -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end. place: the folder above it; None: shared
    memory, or the temporary folder where there is none.
    """
    above = place or (str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None)
    path = Path(tempfile.mkdtemp(prefix="reflux-weights-", dir=above))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
