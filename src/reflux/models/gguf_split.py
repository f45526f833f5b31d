"""Sets how the tokenizer of a GGUF file splits a text into pieces. Bytes are merged to tokens inside a piece.

A GGUF file holds a name for the way to split, `tokenizer.ggml.pre`. transformers knows some of these names,
and for every other one it splits as GPT-2 does, without a warning. The ids would then differ from those
that the model was trained with. The names, and what they mean, are those of llama.cpp.
"""

from __future__ import annotations

from typing import Any

from reflux.errors import ModelError
from reflux.models.gguf_header import GgufHeader

# as GPT-2
_PLAIN = ("gpt-2", "phi-2")
# each digit on its own, and between the digits as GPT-2
_DIGITS = ("smollm", "starcoder", "refact", "minerva-7b")
# A piece that is a token becomes this token, also where no merges lead to it.
_WHOLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# Characters are composed first, as the tokenizers of these models do.
_COMPOSED = ("qwen2", "qwen35")


def split_as_trained(tokenizer: Any, header: GgufHeader, name: str, path: str) -> None:
    """Make a tokenizer that transformers has built from a GGUF file split a text as its model was trained.
    Tokenizers that are not byte-level are left as they are.

    name: the model; path: the path of its key in the recipe, for errors. ModelError where neither
    transformers nor this module knows how the tokenizer splits, and where a tokenizer of sentencepiece treats
    the begin of a text differently than its file says.
    """
    from tokenizers import normalizers, pre_tokenizers

    if header.settings.get("tokenizer.ggml.model") != "gpt2":
        _refuse_other_prefix(tokenizer, header, name, path)
        return
    kind = header.settings.get("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if kind in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif kind not in _PLAIN and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        # This is what transformers sets for a name that it does not know.
        said = "does not say how its tokenizer splits a text" if kind is None else f"has the tokenizer {kind}"
        raise ModelError(
            f"{path}: {name} {said} (tokenizer.ggml.pre), and transformers would split a text as GPT-2 does, "
            "so the model would read other tokens than those it was trained with. Give the model in "
            "safetensors."
        )
    if kind in _WHOLE:
        backend.model.ignore_merges = True
    if kind in _COMPOSED:
        backend.normalizer = normalizers.NFC()


def _refuse_other_prefix(tokenizer: Any, header: GgufHeader, name: str, path: str) -> None:
    """ModelError if the file says whether a space is put before a text, and the tokenizer does otherwise:
    transformers does not read this setting.
    """
    wanted = header.settings.get("tokenizer.ggml.add_space_prefix")
    if wanted is None or "".join(tokenizer.tokenize("a")).startswith("▁") == bool(wanted):
        return
    says, does = ("a", "none") if wanted else ("no", "one")
    raise ModelError(
        f"{path}: {name} has a tokenizer that puts {says} space before a text "
        f"(tokenizer.ggml.add_space_prefix), and transformers would put {does}, so the model would read "
        "other tokens than those it was trained with. Give the model in safetensors."
    )
