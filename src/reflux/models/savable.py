"""Checks before training that the trained student can be saved.

transformers accepts settings on loading that it refuses on saving, so that a run would end at its first save.
"""

from __future__ import annotations

import tempfile
from typing import Any

from reflux.errors import ModelError
from reflux.models.text import Model, first_line

# what remains of generation settings that cannot be mended
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def mend_generation_config(net: Any) -> str | None:
    """Make the generation settings of the net valid in place, and return a sentence that says what was
    changed; None where they were valid. The library itself reads only their end tokens.

    Sampling values without do_sample mean that the model is to be sampled from, so do_sample is set. Where
    do_sample is false, the temperature is 0 or other values are refused, only the token ids are kept.
    """
    from transformers import GenerationConfig

    before = net.generation_config
    greedy = before.do_sample is False or before.temperature == 0
    sampling = GenerationConfig.from_dict({**before.to_dict(), "do_sample": not greedy})
    tokens = {name: getattr(before, name) for name in _TOKENS}
    plain = GenerationConfig(**{name: ids for name, ids in tokens.items() if ids is not None and ids != -1})
    for settings, change in (
        (before, None),
        (sampling, "it has sampling values without do_sample; the exported student has do_sample = true"),
        (plain, "transformers refuses its values; the exported student has only its token ids"),
    ):
        if _is_valid(settings):
            net.generation_config = settings
            return change and f"generation_config.json of {net.name_or_path} cannot be saved: {change}."
    return None


def check_savable(model: Model, path: str = "learner.model") -> None:
    """ModelError, with the reason, where the config, the generation settings or the tokenizer of the model
    cannot be saved, or where its weights are quantised. They are written to a temporary folder, without the
    weights. path: the path of the model's key in the recipe, for errors.
    """
    narrow = [name for name, own in model.net.named_parameters() if not own.dtype.is_floating_point]
    if narrow or getattr(model.net, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{path}: the weights of {model.net.name_or_path} are quantised, and quantised weights cannot be "
            "trained. Give the model in float32, bfloat16 or float16."
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.net.save_pretrained(folder, state_dict={})
            model.tokenizer.save_pretrained(folder)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{path}: {model.net.name_or_path} could not be saved after training: {first_line(error)}"
        ) from error


def _is_valid(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True
