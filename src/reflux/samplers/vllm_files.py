"""The student's files as a vLLM server loads them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reflux.engines.vllm_command import Installed, installed_in
from reflux.models import lora
from reflux.models.adapter_source import is_adapter
from reflux.models.cpu.precision import multiplies_natively
from reflux.models.gguf_header import is_gguf
from reflux.models.locations import local_folder
from reflux.models.text import load_model
from reflux.models.weight_files import read_json

if TYPE_CHECKING:
    from reflux.config.context import PartContext

_WHERE = "learner.model"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ServedModel:
    """A model as a server loads it."""

    # in Hugging Face format
    folder: Path
    # that the server computes in
    dtype: torch.dtype
    # the vLLM of a managed server; None for a server that runs already
    installed: Installed | None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def served_model(managed: bool, python: str | None, dtype: str, context: PartContext) -> ServedModel:
    """The student's files: its own folder, or for an adapter and a GGUF file a folder of this part with the
    merged or dequantised weights. managed: the server is started with the interpreter `python`, see
    `installed_in`. ConfigError where vLLM is not installed.
    """
    installed = installed_in(python, "sampler.python") if managed else None
    student = context.student
    folder = local_folder(student.model, _WHERE)
    if folder is None or is_adapter(folder) or is_gguf(student.model):
        folder = context.folder / "served"
        # Made anew each time: the files that it is made from may have changed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _export(context, folder)
    cpu = installed is not None and installed.cpu
    return ServedModel(folder, _dtype(dtype, folder, cpu), installed)


def _export(context: PartContext, folder: Path) -> None:
    student = context.student
    model = load_model(
        student.model,
        _WHERE,
        device="cpu",
        trust_remote_code=student.trust_remote_code,
        base=student.base_model,
    )
    lora.export(model, folder)


def _dtype(wanted: str, folder: Path, cpu: bool) -> torch.dtype:
    """What "auto" is: as stored, but float32 on a CPU that is slower in 16 bits."""
    if wanted != "auto":
        return _DTYPES[wanted]
    config = read_json(folder / "config.json", _WHERE)
    config = config.get("text_config") or config
    stored = _DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "float32", torch.float32)
    return torch.float32 if cpu and not multiplies_natively(stored) else stored
