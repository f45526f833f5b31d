"""Hugging Face causal models: a trunk that gives hidden states, an output head (the matrix that maps hidden
states to logits) and a tokenizer.

Only safetensors and GGUF files are loaded, and never pickles. The code of a model repository is not run
unless the recipe has `trust_remote_code = true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.errors import ModelError
from reflux.models import adapter_source
from reflux.models.chat.ends import end_ids
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.token_map import vocabulary_size
from reflux.models.context_window import context_tokens
from reflux.models.gguf_header import is_gguf, source
from reflux.models.gguf_kind import refuse_other_files
from reflux.models.gguf_split import split_as_trained
from reflux.models.locations import SHIPPED, locate
from reflux.models.placement import pick_device

if TYPE_CHECKING:
    import torch

    from reflux.kernels.head import Head

# tolerated difference as a share of the largest logit, for rounding in float32
HEAD_SHARE = 1e-3
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(
    name: str, path: str = "model", trust_remote_code: bool = False, base: str | None = None
) -> Any:
    """The tokenizer of a model. An adapter without a tokenizer has that of its base model. The arguments are
    those of `load_model`.
    """
    from transformers import AutoTokenizer

    from reflux.models.text_adapters import adapter_in

    where = locate(name, path)
    header = refuse_other_files(where, path) if is_gguf(where) else None
    adapter = Path(where)
    if adapter_source.is_adapter(adapter) and not any((adapter / file).is_file() for file in _TOKENIZERS):
        return load_tokenizer(adapter_source.base_of(adapter, path, base), path, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source(where), trust_remote_code=trust_remote_code)
    except Exception as error:
        # Files with other content than expected may fail with any exception.
        # An adapter of the hub need not have a tokenizer, and is known as an adapter only once it is here.
        fetched = None if adapter.is_dir() else adapter_in(where, path)
        if fetched is not None:
            return load_tokenizer(adapter_source.base_of(fetched, path, base), path, trust_remote_code)
        raise ModelError(not_loaded(path, "tokenizer", name, error)) from error
    if header is not None:
        split_as_trained(tokenizer, header, name, path)
    return tokenizer


@dataclass(frozen=True)
class Model:
    """A loaded model. `trunk` maps ids to hidden states, and `head` maps these to logits over the real
    vocabulary (without padding rows).
    """

    # the transformers model (or its peft wrapper)
    net: Any
    trunk: Any
    head: Head
    tokenizer: Any
    vocabulary: int
    end_ids: tuple[int, ...]
    context_tokens: int
    # the dtype of its files; exports use it
    stored_dtype: torch.dtype | None = None
    # True where every layer has scaled-dot-product attention over all earlier positions
    plain_attention: bool = False
    # sentences that say in which way the weights differ from those of the files
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.net.device

    def renderer(
        self, system: str | None, template: Mapping[str, Any] | None, suffix: str | None = None
    ) -> Renderer:
        return Renderer(self.tokenizer, system, template, suffix)


def load_model(
    name: str,
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    base: str | None = None,
    moves: bool = False,
) -> Model:
    """Load weights and tokenizer. path: the path of the key in the recipe, for errors. attention: the
    `attn_implementation` argument of transformers. dtype "auto": as stored, but float32 on a CPU that is
    slower in the stored one. device "auto": the first GPU, else the CPU. device_map: placement by accelerate
    instead of `device`. moves: True for a model that is moved to another device afterwards, so that no layer
    is replaced by one that is faster on this device.

    A peft adapter is merged into its base model, which is `base` or else the one that the adapter's config
    names. The weights of a GGUF file are dequantised. ModelError where the files are not whole, hold other
    weights than the model's, or hold no causal language model.
    """
    from reflux.models.causal_net import correct_tie, load_causal_net
    from reflux.models.cpu.linear import speed_up
    from reflux.models.cpu.norm import fuse_norms
    from reflux.models.cpu.precision import widen
    from reflux.models.gguf_net import notes_on
    from reflux.models.logit_checks import refuse_wrong_logits
    from reflux.models.text_adapters import adapter_in, merge_adapter

    place, where = pick_device(device), locate(name, path)
    adapter = adapter_in(where, path)
    if adapter is not None:
        where = locate(adapter_source.base_of(adapter, path, base), path)
    tokenizer = load_tokenizer(name, path, trust_remote_code, base)
    net, stored = load_causal_net(
        where,
        name,
        path,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
    )
    notes = notes_on(where, name)
    if dtype == "auto" and place == "cpu" and not device_map:
        notes = (*notes, *widen(net, name))
    if adapter is not None:
        net = merge_adapter(net, adapter, name, path)
    correct_tie(net)
    placed = net if device_map else net.to(place)
    if not moves:
        speed_up(placed)
        fuse_norms(placed)
    model = replace(as_model(placed, tokenizer, stored), notes=notes)
    refuse_wrong_logits(model, name, path)
    return model


def head_gap(model: Model) -> tuple[float, float]:
    """The largest difference between the library's logits and the model's on a few tokens, and the largest
    difference that rounding explains.
    """
    import torch

    ids = torch.arange(min(8, model.vocabulary), device=model.device)[None]
    with torch.no_grad():
        ours = model.head.logits(model.trunk(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model.net(input_ids=ids, use_cache=False).logits[..., : model.vocabulary].to(ours.device)
    # The two computations may round differently, by some units in the last place.
    share = max(HEAD_SHARE, 8 * torch.finfo(theirs.dtype).eps)
    return float((ours - theirs).abs().max()), share * max(1.0, float(theirs.abs().max()))


def as_model(net: Any, tokenizer: Any, stored_dtype: torch.dtype | None = None) -> Model:
    """A `Model` from a transformers model that is already in memory. stored_dtype: as in `Model`."""
    from reflux.kernels.head import Head

    vocabulary = vocabulary_size(tokenizer)
    if net.config.get_text_config().vocab_size < vocabulary:
        rows = net.config.get_text_config().vocab_size
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens but the model has only {rows} output rows: they do not "
            "belong together"
        )
    return Model(
        net=net,
        trunk=_trunk(net),
        head=Head.of_net(net, vocabulary),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        end_ids=end_ids(tokenizer, net.generation_config),
        context_tokens=context_tokens(_fields(net.config.get_text_config())) or 1 << 30,
        stored_dtype=stored_dtype,
        plain_attention=_plain_attention(net),
    )


def _fields(config: Any) -> dict[str, Any]:
    """The content of the config, with the window under its usual name where the architecture has another."""
    return config.to_dict() | {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}


def _trunk(net: Any) -> Any:
    """The model without its output head. Some classes name it in another way than `base_model` expects."""
    return net.base_model if net.base_model is not net else getattr(net, "model", net)


def _plain_attention(net: Any) -> bool:
    """True if a mask alone says what a token attends to. Models without rotary embeddings are left out,
    because some of them compute positions from the mask.
    """
    config = net.config.get_text_config()
    rotary = getattr(net.base_model, "rotary_emb", None) is not None and not getattr(config, "alibi", False)
    windowed = getattr(config, "sliding_window", None) is not None
    return (
        net.config._attn_implementation == "sdpa"
        and rotary
        and not windowed
        and set(getattr(config, "layer_types", ())) <= {"full_attention"}
    )


def share_cores(parties: int) -> None:
    """Limit torch in the calling thread to an equal share of the cores, so that threads that run at the same
    time do not wait for each other's cores. parties: the number of these threads.
    """
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // parties))


def not_loaded(path: str, what: str, name: str, error: Exception) -> str:
    where = (
        ""
        if Path(name).exists() or name.startswith(SHIPPED)
        else "it is not in a folder here, and the hub did not give it: "
    )
    # Other exceptions than these may say no more than a key.
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{path}: the {what} of {name} cannot be loaded: {where}{kind}{first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line of the error's text, and the next one where the first ends with a colon."""
    first, *rest = [line.strip() for line in str(error).strip().split("\n")]
    return (f"{first} {rest[0]}" if rest and first.endswith(":") else first)[:300]
