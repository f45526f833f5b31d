"""Reads only the output head of a model from its safetensors files: for a teacher whose other weights are in
a server.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.errors import ModelError
from reflux.models.locations import locate
from reflux.models.weight_files import check_files, read_header, read_json, weight_files

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.kernels.head import Head

# the ends of the names of output matrices, and of the embeddings that replace them where the two are tied
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def load_head(
    name: str,
    path: str,
    vocabulary: int,
    device: str,
    temperature: float = 1.0,
    trust_remote_code: bool = False,
) -> Head:
    """The output head of the model `name`, a folder or a hub id, on `device`. vocabulary: the number of real
    tokens. temperature: the logits are divided by it.

    path: the path of the key in the recipe, for errors. ModelError for files that have no head under a known
    name, and for a temperature other than 1 where the model caps its logits, because the cap comes last.
    """
    import torch
    from transformers import AutoConfig

    from reflux.kernels.head import Bare, Head, scale_and_cap

    files = _Local(name, path) if Path(locate(name, path)).is_dir() else _Hub(name)
    loaded = AutoConfig.from_pretrained(files.source, trust_remote_code=trust_remote_code)
    config = loaded.get_text_config()
    weight_VH, bias_V = _tensors(files, path, config.tie_word_embeddings)
    if len(weight_VH) < vocabulary:
        raise ModelError(
            f"{path}: the output head in {name} has {len(weight_VH)} rows, and the tokenizer has "
            f"{vocabulary} tokens: they do not belong together."
        )
    scale, cap = scale_and_cap(config)
    if cap and temperature != 1:
        raise ModelError(
            f"{path}: the model {name} caps its logits, and temperature = {temperature:g} would have to be "
            "applied after the cap. Use temperature = 1."
        )
    # Many CPUs multiply in 16 bits slowly, and the head is small beside a model.
    dtype = torch.float32 if device == "cpu" else weight_VH.dtype
    bare = Bare(weight_VH.to(device, dtype), None if bias_V is None else bias_V.to(device, dtype))
    return Head(lambda: bare, vocabulary, scale / temperature, cap)


class _Local:
    """The weight files of a folder."""

    def __init__(self, name: str, path: str):
        folder = Path(locate(name, path))
        check_files(folder, path)
        self.source = str(folder)
        # the file of each tensor
        self.files = {key: file for file in weight_files(folder, path) for key in read_header(file, path)}

    def fetched(self, key: str) -> Path:
        return self.files[key]


class _Hub:
    """The weight files of a model on the hub. Only the index and the file with the head are downloaded."""

    def __init__(self, name: str):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        self.source = name
        try:
            index = hf_hub_download(name, "model.safetensors.index.json")
            self.files: dict[str, str] = read_json(Path(index), name)["weight_map"]
        except EntryNotFoundError:
            whole = Path(hf_hub_download(name, "model.safetensors"))
            self.files = dict.fromkeys(read_header(whole, name), whole.name)

    def fetched(self, key: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.source, self.files[key]))


def _tensors(files: _Local | _Hub, path: str, tied: bool) -> tuple[Tensor, Tensor | None]:
    """The weight of the head, and its bias if it has one."""
    from safetensors import safe_open

    wanted = HEADS + (EMBEDDINGS if tied else ())
    keys = (key for end in wanted for key in files.files if key == end or key.endswith(f".{end}"))
    key = next(keys, None)
    if key is None:
        raise ModelError(
            f"{path}: the weights of {files.source} have no output head under a known name "
            f'({", ".join(wanted)}). Use a local teacher, or another value of `gives` than "hidden".'
        )
    found: list[Any] = []
    for name in (key, f"{key.removesuffix('weight')}bias"):
        if name in files.files:
            with safe_open(files.fetched(name), framework="pt") as file:
                found.append(file.get_tensor(name))
    return found[0], found[1] if len(found) > 1 else None
