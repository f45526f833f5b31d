"""The end ids in the files of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflux.config.context import StudentSpec
from reflux.errors import ModelError
from reflux.models.adapter_source import base_of
from reflux.models.chat.ends import declared_ends, end_ids
from reflux.models.gguf_header import is_gguf, source
from reflux.models.locations import locate
from reflux.models.text import first_line


def end_ids_of(model: StudentSpec, path: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a turn of a model, the same as those of the loaded model. path: the path of the key in
    the recipe, for errors.
    """
    return end_ids(tokenizer, _generation(model, path))


def _generation(model: StudentSpec, path: str) -> Any:
    """The generation config as `from_pretrained` of a model gives it: the file, or what the model's config
    says where there is no such file. An adapter has that of its base model.
    """
    from transformers import AutoConfig, GenerationConfig

    from reflux.models.text_adapters import adapter_in

    where = locate(model.model, path)
    adapter = adapter_in(where, path)
    if adapter is not None:
        where = locate(base_of(adapter, path, model.base_model), path)
    try:
        if not is_gguf(where):
            return GenerationConfig.from_pretrained(where)
    except OSError:
        pass
    try:
        config = AutoConfig.from_pretrained(**source(where), trust_remote_code=model.trust_remote_code)
    except Exception as error:
        # A file with other content than expected may fail with any exception.
        raise ModelError(
            f"{path}: the config of {model.model} cannot be read: {first_line(error)}"
        ) from error
    return GenerationConfig.from_model_config(config)


def write_end_ids(generation: Any, ends: Sequence[int], folder: Path) -> None:
    """Save the generation config in `folder` with all `ends` as end ids, where it has others. Programs that
    generate with the model stop at these ids only. generation: the generation config of the model; None if
    it has none.
    """
    if generation is None or set(declared_ends(generation)) == set(ends):
        return
    changed = copy.deepcopy(generation)
    changed.eos_token_id = list(ends)
    changed.save_pretrained(folder)
