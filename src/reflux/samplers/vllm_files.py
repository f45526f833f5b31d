"""The files and the settings that a vLLM server of the student is started with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reflux.engines.plugin import FILE_BACKEND
from reflux.engines.vllm_command import Installed, ServerSettings, installed_in
from reflux.models import lora
from reflux.models.adapter_source import is_adapter
from reflux.models.cpu.precision import multiplies_natively
from reflux.models.gguf_header import is_gguf
from reflux.models.locations import local_folder
from reflux.models.sizes import size_of
from reflux.models.text import load_model
from reflux.models.weight_files import read_json

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.samplers.vllm import VLLM

_WHERE = "learner.model"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the ranks of adapters that vLLM reserves room for
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServedModel:
    """A model as a server loads it."""

    # in Hugging Face format
    folder: Path
    # that the server computes in
    dtype: torch.dtype
    # the vLLM of a managed server; None for a server that runs already
    installed: Installed | None


def served_model(cfg: VLLM, context: PartContext) -> ServedModel:
    """The student's files: its own folder, or for an adapter and a GGUF file a folder of this part with the
    merged or dequantised weights. ConfigError where vLLM is not installed, ModelError for a model without
    files here.
    """
    installed = None if cfg.mode == "url" else installed_in(cfg.python, "sampler.python")
    student = context.student
    folder = local_folder(student.model, _WHERE)
    if folder is None or is_adapter(folder) or is_gguf(student.model):
        folder = context.folder / "served"
        # Made anew each time: the files that it is made from may have changed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _export(context, folder)
    cpu = installed is not None and installed.cpu
    return ServedModel(folder, _dtype(cfg.dtype, folder, cpu), installed)


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


def settings_of(cfg: VLLM, context: PartContext, model: ServedModel) -> ServerSettings:
    """Of a managed server."""
    assert model.installed is not None
    own = size_of(str(model.folder), _WHERE).context_tokens or 0
    return ServerSettings(
        installed=model.installed,
        model=str(model.folder),
        dtype=str(model.dtype).removeprefix("torch."),
        context_tokens=min(cfg.context_tokens or own, own or cfg.context_tokens),
        transfer=FILE_BACKEND if cfg.transfer == "file" else cfg.transfer,
        cache_gib=cfg.cache_gib,
        gpu_memory=cfg.gpu_memory,
        sleeps=cfg.mode == "colocated",
        lora_rank=next((rank for rank in _RANKS if rank >= cfg.lora_rank), 0) if cfg.lora_rank else 0,
        trust_remote_code=context.student.trust_remote_code,
        arguments=cfg.arguments,
    )
