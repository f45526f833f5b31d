"""The end ids of a model whose weights are not loaded, from its files."""

from __future__ import annotations

from typing import Any

from reflux.errors import ModelError
from reflux.models.chat.ends import end_ids
from reflux.models.text import first_line, locate


def end_ids_of(name: str, path: str, tokenizer: Any, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The ids that end a turn of the model `name`, the same as those of the loaded model. path: the path of
    the key in the recipe, for errors.
    """
    return end_ids(tokenizer, _generation(name, path, trust_remote_code))


def _generation(name: str, path: str, trust_remote_code: bool) -> Any:
    """The generation config as `from_pretrained` of a model gives it: the file, or what the model's config
    says where there is no such file.
    """
    from transformers import AutoConfig, GenerationConfig

    where = locate(name, path)
    try:
        return GenerationConfig.from_pretrained(where)
    except OSError:
        pass
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the config of {name} cannot be read: {first_line(error)}") from error
    return GenerationConfig.from_model_config(config)
