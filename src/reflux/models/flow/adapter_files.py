"""Reads and writes adapter files in the formats of peft and of diffusers.

Reading is strict, so that a missing key raises an error and does not silently leave the base model
unchanged.

peft:       adapter_config.json and adapter_model.safetensors,
            keys base_model.model.<module>.lora_A.weight (and lora_B)
diffusers:  pytorch_lora_weights.safetensors, keys transformer.<module>.lora_A.weight; the scale is in the
            file's header (as diffusers writes it today) or in <module>.alpha, which is divided by the
            rank; without either it is 1
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.flow.adapter_folders import CONFIG, DIFFUSERS, PEFT, adapter_file
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_adapters import Adapter, Factors, layers_of, linear_shapes, lora_config, missed
from reflux.models.text import first_line
from reflux.models.weight_files import read_json

# the header key under which diffusers stores peft's config
HEADER = "lora_adapter_metadata"
PREFIXES = {PEFT: "base_model.model.", DIFFUSERS: "transformer."}
# largest number of names in an error
SHOWN = 4
# init_lora_weights values that leave the base model unchanged. Other values change the base model at the
# start, and the file does not contain this change.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def read_adapter(name: str, transformer: Any, path: str) -> Adapter:
    """The adapter in a folder, in a run directory or of a hub id, checked against this transformer (which is
    not changed). path: the path of the key in the recipe, for errors.

    ModelError that lists every fault: a module without one of its LoRA matrices A and B, a module that the
    peft config targets and the file lacks, a key that matches no linear layer, a shape that does not fit.
    ModelError also for anything but a plain low-rank adapter.
    """
    file = adapter_file(name, path)
    tensors, header = _load(file, path)
    config = _peft_config(file.parent, path) if file.name == PEFT else _diffusers_config(header, path)
    with torch.device("meta"):
        bare = library().SD3Transformer2DModel.from_config(transformer.config)
    shapes = linear_shapes(bare)
    planned = None if config is None else _planned(config, bare, path)
    parts, unknown = _parts(tensors, PREFIXES[file.name], shapes, alphas=planned is None)
    faults = [
        *_faults(parts, shapes, planned),
        *_listed("keys that match no linear layer of this transformer", unknown),
    ]
    if faults or not parts:
        faults = faults or ["it is empty"]
        raise ModelError(
            f"{path}: the adapter in {name} does not fit its base model: {'; '.join(faults)}. Loading it "
            "would leave these parts of the base model unchanged. "
            f"Check that the file is complete and was made for this model."
        )
    return Adapter({module: _factors(module, part, planned) for module, part in parts.items()}, name)


def write_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapter as one file in diffusers' format, which `read_adapter` and diffusers'
    `load_lora_weights` read. dtype: of the LoRA matrices in the file; None keeps their dtype.
    """
    layers = {}
    for module, factors in adapter.factors.items():
        for letter, value in (("A", factors.A), ("B", factors.B)):
            layers[f"{module}.lora_{letter}.weight"] = (
                value.detach().to("cpu", dtype or value.dtype).contiguous()
            )
    library().StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=lora_config(adapter).to_dict(),
    )


def _load(file: Path, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            # `opened` is not a mapping, so it cannot be iterated without keys().
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(
            f"{path}: {file} cannot be read and may be incomplete: {first_line(error)}"
        ) from error


def _peft_config(folder: Path, path: str) -> Any:
    from peft import LoraConfig

    table = read_json(folder / CONFIG, path)
    if table.get("peft_type") != "LORA":
        raise ModelError(
            f"{path}: the adapter in {folder} has the type {table.get('peft_type')}; only LORA is supported."
        )
    return LoraConfig.from_pretrained(str(folder))


def _diffusers_config(header: dict[str, str], path: str) -> Any:
    from peft import LoraConfig

    if HEADER not in header:
        return None
    table = {
        key.removeprefix(PREFIXES[DIFFUSERS]): value for key, value in json.loads(header[HEADER]).items()
    }
    try:
        return LoraConfig(**table)
    except TypeError as error:
        raise ModelError(
            f"{path}: this adapter was written by another version of peft: {first_line(error)}"
        ) from error


def _planned(config: Any, bare: Any, path: str) -> dict[str, tuple[int, float]]:
    """(rank, scale) of every module that peft adapts under this config."""
    from peft import inject_adapter_in_model

    special = [
        field
        for field in ("use_dora", "lora_bias", "modules_to_save", "target_parameters")
        if getattr(config, field, None)
    ]
    special += ["bias"] if config.bias != "none" else []
    special += ["init_lora_weights"] if config.init_lora_weights not in PLAIN_STARTS else []
    if special:
        raise ModelError(
            f"{path}: this adapter has more than the LoRA matrices A and B per linear layer "
            f"({', '.join(special)}), which is not supported."
        )
    config.init_lora_weights = False
    lost = (
        missed(list(config.target_modules), linear_shapes(bare))
        if isinstance(config.target_modules, set | list)
        else []
    )
    if lost:
        raise ModelError(
            f"{path}: this adapter's config targets {', '.join(lost)}, which its base model does not have."
        )
    try:
        inject_adapter_in_model(config, bare, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ModelError(
            f"{path}: peft cannot attach this adapter to its base model: {first_line(error)}"
        ) from error
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers_of(bare)}


def _parts(
    tensors: dict[str, Tensor], prefix: str, shapes: dict[str, tuple[int, int]], alphas: bool
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module and role ("A", "B", "alpha"), and the keys without a module or role."""
    roles = {".lora_A.weight": "A", ".lora_B.weight": "B"} | ({".alpha": "alpha"} if alphas else {})
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        end = next((end for end in roles if key.endswith(end)), None)
        module = key.removeprefix(prefix).removesuffix(end or "")
        if end is None or not key.startswith(prefix) or module not in shapes:
            unknown.append(key)
        else:
            parts.setdefault(module, {})[roles[end]] = value
    return parts, unknown


def _faults(
    parts: dict[str, dict[str, Tensor]],
    shapes: dict[str, tuple[int, int]],
    planned: dict[str, tuple[int, float]] | None,
) -> Iterable[str]:
    lacking = [
        f"{module}.lora_{letter}" for module, part in parts.items() for letter in "AB" if letter not in part
    ]
    whole = {module: part for module, part in parts.items() if "A" in part and "B" in part}
    crooked = []
    for module, part in whole.items():
        rank = planned[module][0] if planned and module in planned else len(part["A"])
        outputs, inputs = shapes[module]
        if part["A"].shape != (rank, inputs) or part["B"].shape != (outputs, rank):
            crooked.append(
                f"{module} (A {tuple(part['A'].shape)}, expected {(rank, inputs)}; "
                f"B {tuple(part['B'].shape)}, expected {(outputs, rank)})"
            )
    yield from _listed(
        "LoRA matrices that are missing",
        [*lacking, *((m for m in planned if m not in parts) if planned else ())],
    )
    yield from _listed(
        "modules that its config does not target",
        [m for m in parts if m not in planned] if planned is not None else [],
    )
    yield from _listed("shapes that do not fit", crooked)


def _listed(what: str, names: list[str]) -> Iterable[str]:
    """ "LoRA matrices that are missing (7): a, b, c, d, ..." """
    if names:
        yield f"{what} ({len(names)}): {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


def _factors(module: str, part: dict[str, Tensor], planned: dict[str, tuple[int, float]] | None) -> Factors:
    rank = len(part["A"])
    scale = (
        planned[module][1] if planned is not None else float(part["alpha"]) / rank if "alpha" in part else 1.0
    )
    return Factors(part["A"], part["B"], scale)
