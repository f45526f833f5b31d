"""Hugging Face causal models: a trunk that gives hidden states, an output head (the matrix that maps hidden
states to logits) and a tokenizer.

Only safetensors files are loaded. The code of a model repository is not run unless the recipe has
`trust_remote_code = true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.errors import ModelError
from reflux.models.rope_window import steady_tokens
from reflux.models.tokenizer import Renderer, end_ids, vocabulary_size

if TYPE_CHECKING:
    import torch

    from reflux.kernels.head import Head

ASSETS = Path(__file__).parents[1] / "assets"
# tolerated difference as a share of the largest logit, for rounding in float32
HEAD_SHARE = 1e-3
# index files of transformers models and of diffusers pipelines
INDEXES = ("config.json", "model_index.json")
# prefix of the models in this package: "reflux:student" is the one named student
SHIPPED = "reflux:"


def locate(name: str, path: str = "model") -> str:
    """The argument of `from_pretrained` for a folder, an earlier run directory, a shipped model or else a
    hub id.

    path: the path of the key in the recipe, for errors. ModelError for a name that looks like a folder but is
    not one, before the hub is contacted.
    """
    if name.startswith(SHIPPED):
        folder = ASSETS / name.removeprefix(SHIPPED)
        if not folder.is_dir():
            shipped = ", ".join(
                sorted(
                    f"{SHIPPED}{entry.parent.name}"
                    for index in INDEXES
                    for entry in ASSETS.glob(f"*/{index}")
                )
            )
            raise ModelError(f"{path}: there is no shipped model '{name}'. Shipped models: {shipped}")
        return str(folder)
    folder = Path(name).expanduser()
    for candidate in (folder / "student", folder):
        if any((candidate / index).is_file() for index in INDEXES):
            return str(candidate)
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        why = f"has no {' and no '.join(INDEXES)}" if folder.is_dir() else "does not exist"
        raise ModelError(
            f"{path}: the folder {name} {why}. Give a folder in Hugging Face format, a run directory, or a "
            "hub id such as Qwen/Qwen3-0.6B."
        )
    return name


def load_tokenizer(name: str, path: str = "model", trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    where = locate(name, path)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded(path, "tokenizer", name, error)) from error


def local_folder(name: str, path: str = "model") -> Path | None:
    """The folder of a model's files on this machine, the hub's cache included; None where there is no such
    folder. Nothing is downloaded. path: the path of the key in the recipe, for errors.
    """
    where = Path(locate(name, path))
    if any((where / index).is_file() for index in INDEXES):
        return where
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(name, index) for index in INDEXES)
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


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
) -> Model:
    """Load weights and tokenizer. path: the path of the key in the recipe, for errors. attention: the
    `attn_implementation` argument of transformers. dtype "auto": as stored. device "auto": the first GPU,
    else the CPU. device_map: placement by accelerate instead of `device`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from reflux.models.cpu.linear import speed_up
    from reflux.models.cpu.norm import fuse_norms

    where = locate(name, path)
    tokenizer = load_tokenizer(name, path, trust_remote_code)
    try:
        net = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded(path, "model", name, error)) from error
    stored = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code).dtype
    placed = net if device_map else net.to(pick_device(device))  # pyright: ignore[reportArgumentType]
    speed_up(placed)
    fuse_norms(placed)
    model = as_model(placed, tokenizer, stored if isinstance(stored, torch.dtype) else None)
    try:
        gap, bound = head_gap(model)
    except Exception as error:
        raise ModelError(
            f"{path}: the forward pass of {name} over a few tokens failed: {type(error).__name__}: "
            f"{first_line(error)}. The model needs other inputs than the tokens of a text, or a package that "
            "is not installed."
        ) from error
    if not gap <= bound:
        raise ModelError(
            f"{path}: {name} computes its logits from the last hidden states in a way that this library "
            "does not support: the logits differ by "
            f"{gap:.3g}. Use a model of another architecture, or report its name to us."
        )
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
        context_tokens=_context_tokens(net.config.get_text_config()),
        stored_dtype=stored_dtype,
        plain_attention=_plain_attention(net),
    )


def _trunk(net: Any) -> Any:
    """The model without its output head. Some classes name it in another way than `base_model` expects."""
    return net.base_model if net.base_model is not net else getattr(net, "model", net)


def _context_tokens(config: Any) -> int:
    """The most tokens of a text. It is smaller than the model's window if rotary angles change earlier."""
    window = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    return min(window, steady_tokens(config.to_dict()) or window)


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


def prepare_torch(threads: int, deterministic: bool) -> None:
    """Apply the process-wide settings of a run. threads 0 keeps the default of torch. deterministic: True if
    torch uses only deterministic algorithms.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def share_cores(parties: int) -> None:
    """Limit torch in the calling thread to an equal share of the cores, so that threads that run at the same
    time do not wait for each other's cores. parties: the number of these threads.
    """
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // parties))


def pick_device(device: str) -> str:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f'device = "{device}", but torch finds no GPU. Leave device out, or install a torch built '
            "for CUDA."
        )
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def parameter_count(net: Any) -> int:
    """Number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in net.parameters()}.values())


def _not_loaded(path: str, what: str, name: str, error: Exception) -> str:
    where = (
        ""
        if Path(name).exists() or name.startswith(SHIPPED)
        else "there is no such folder here, and no such model on the hub: "
    )
    return f"{path}: the {what} of {name} cannot be loaded: {where}{first_line(error)}"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
