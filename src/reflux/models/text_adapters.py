"""Loads a peft adapter of a text model and merges it into its base model.

Each adapter is merged into a copy of its base model of its own, so that the result is a plain model for every
part that uses it. Several adapters of one base model therefore take the memory of as many models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from reflux.errors import ModelError
from reflux.models.adapter_source import CONFIG, WEIGHTS, is_adapter
from reflux.models.gguf_header import is_gguf
from reflux.models.weight_files import listed, read_header, weight_files


def adapter_in(where: str, path: str) -> Path | None:
    """The folder of the adapter that a folder or a hub id holds, fetched from the hub if it is not here.
    None where it holds no adapter. path: the path of the key in the recipe, for errors.

    ModelError for a folder with an adapter and a full model, because it is not known whether the adapter is
    already merged into that model.
    """
    folder = Path(where)
    if folder.is_dir():
        if (folder / CONFIG).is_file() and weight_files(folder, path):
            raise ModelError(
                f"{path}: {folder} holds a full model and an adapter ({CONFIG}). Put them into two folders: "
                "with the full model alone the adapter is left out, and with the adapter alone it is merged "
                "into its base model."
            )
        return folder if is_adapter(folder) else None
    if is_gguf(where):
        return None
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(where) is None:
        return None
    return Path(snapshot_download(where, allow_patterns=[CONFIG, WEIGHTS]))


def merge_adapter(net: Any, folder: Path, name: str, path: str) -> Any:
    """The net with the adapter of a folder added to its weights, in the dtype of the weights. name: the
    adapter, for errors; path: the path of its key in the recipe.

    ModelError that lists the tensors that the adapter's config and its file do not have in common, or whose
    shape does not fit.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    _prepare(net, folder, path)
    try:
        wrapped = PeftModel(net, config)
        found = wrapped.load_adapter(str(folder), "default", torch_device=str(net.device))
        faults = [
            f"{what} {len(names)} tensors: {listed(names)}"
            for what, names in (
                ("its file lacks", found.missing_keys),
                ("its config does not use", found.unexpected_keys),
            )
            if names
        ]
        if not faults:
            # peft has frozen the base model, and a merged student is trained as a whole.
            return wrapped.merge_and_unload(safe_merge=True).requires_grad_(True)
    except (ValueError, RuntimeError, ImportError) as error:
        faults = [" ".join(str(error).split())[:300]]
    raise ModelError(
        f"{path}: the adapter in {name} does not fit its base model: {'; '.join(faults)}. Check that it is "
        "complete and was made for this base model."
    )


def _prepare(net: Any, folder: Path, path: str) -> None:
    """Fit the embedding and the head of the net to what the adapter's file holds for them.

    Trainers that add tokens store the whole embedding and the whole head, of another size. An adapter on only
    one of two matrices that are tied in the net unties them, since the merge would change both. ModelError
    where only the embedding is stored in another size.
    """
    shapes = {key: entry["shape"] for key, entry in read_header(folder / WEIGHTS, path).items()}
    names = {id(module): f".{name}." for name, module in net.named_modules()}
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    begin, end = names[id(embedding)], names[id(head)]
    tied = head.weight is embedding.weight
    if tied and any(".lora_" in key and (begin in key or end in key) for key in shapes):
        head.weight = nn.Parameter(head.weight.detach().clone())

    def rows(place: str) -> int | None:
        parts = (".lora_", ".trainable_tokens_")
        whole = (
            shape[0]
            for key, shape in shapes.items()
            if place in key and not any(part in key for part in parts)
        )
        return next(whole, None)

    count = rows(begin)
    if count is None or count == embedding.weight.shape[0]:
        return
    if not tied and rows(end) != count:
        raise ModelError(
            f"{path}: the adapter in {folder} was trained with an embedding of {count} tokens, and it holds "
            "no head of that size. Merge it where it was trained, and give the merged model."
        )
    net.resize_token_embeddings(count, mean_resizing=False)
