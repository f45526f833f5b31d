"""Tiny untrained flow models that are not degenerate, adapters on them, and hand-made attempts along which
everything is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from device import here
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.net import FlowNet, PromptTable
from reflux.models.flow.sde import step_logp, step_moments
from reflux.types import Attempt, FlowRollout, Prompt, TeacherAnswer, VelocityTarget

# what a tiny model has learned; "" is the unconditional prompt
TEXTS = ("", *(f"draw {number}" for number in range(5)))
# of an image; D = SIDE^2 times the channels
SIDE = 4
# attention's linear layers
ENDS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def model(
    seed: int,
    *,
    side: int = SIDE,
    channels: int = 1,
    layers: int = 2,
    texts: Sequence[str] = TEXTS,
    scale: float = 1.0,
    **scheduler: Any,
) -> FlowModel:
    """SD3Transformer2DModel from random numbers with a prompt table, float32. `scheduler`: fields
    of its config, such as shift=3.0.

    Velocities are of size 1 and depend on state, time and prompt. scale: of the output layer.
    """
    transformer = library().SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=max(4, side // 2),
    )
    table = PromptTable(texts, length=2, width=8, pooled=8)
    net = FlowNet(transformer, table)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim == 1:
                value.normal_(0, 0.1, generator=rng)
            else:
                value.normal_(0, 1.0 if "prompts" in name else value[0].numel() ** -0.5, generator=rng)
        transformer.proj_out.weight.mul_(scale)
    config = dict(library().FlowMatchEulerDiscreteScheduler(**{"shift": 1.0, **scheduler}).config)
    return FlowModel(here(net.eval()), config, table, None, "tiny", torch.float32)


def save(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **fields: Any) -> str:
    """`model` on disk, in diffusers' format."""
    model(seed, **fields).save(Path(folder), dtype)
    return str(folder)


def modules(of: FlowModel, ends: Sequence[str] = ENDS) -> dict[str, tuple[int, int]]:
    """Names, without "transformer.", and (outputs, inputs) of the linear layers with these name suffixes."""
    named = of.net.transformer.named_modules()
    linear = {
        name.replace(".base_layer", ""): module
        for name, module in named
        if isinstance(module, torch.nn.Linear)
    }
    # those of adapters are not the model's
    linear = {name: module for name, module in linear.items() if ".lora_" not in name}
    chosen = [name for name in linear if any(name == end or name.endswith(f".{end}") for end in ends)]
    return {name: (linear[name].out_features, linear[name].in_features) for name in chosen}


def factors(
    of: FlowModel, seed: int, *, rank: int = 2, ends: Sequence[str] = ENDS, size: float = 0.5
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (A, B) of every adapted module: [rank, inputs] and [outputs, rank]. size 0: an untouched
    adapter, whose B is 0.
    """
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, inputs, generator=rng) * inputs**-0.5,
            size * torch.randn(outputs, rank, generator=rng),
        )
        for name, (outputs, inputs) in modules(of, ends).items()
    }


def save_adapter(
    folder: Path, of: FlowModel, seed: int, *, alpha: float = 4.0, format: str = "peft", **fields: Any
) -> str:
    """`factors` on disk as peft or diffusers would write them, by hand from the formats' definition."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = factors(of, seed, **fields)
    rank, ends = next(iter(made.values()))[0].shape[0], list(fields.get("ends", ENDS))
    if format == "peft":
        prefix, file = "base_model.model.", "adapter_model.safetensors"
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ends, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        prefix, file = "transformer.", "pytorch_lora_weights.safetensors"
    tensors = {}
    for name, (A, B) in made.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": B}
        if format != "peft":
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / file)
    return str(folder)


def grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """t_S, float32: the times of diffusers' scheduler."""
    scheduler = library().FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.numpy().astype(np.float32)


def rollout(
    steps: int = 4,
    *,
    seed: int = 0,
    sample: int = 0,
    text: str = TEXTS[1],
    route: str | None = None,
    noise_level: float = 0.7,
    guidance: float = 1.0,
    drawn_by: FlowModel | None = None,
    shape: tuple[int, int, int] = (1, SIDE, SIDE),
    shift: float = 1.0,
    whole: bool = True,
    **fields: Any,
) -> FlowRollout:
    """An attempt of `steps` steps. Its states are random numbers or, with `drawn_by`, were drawn step by step
    from that model.

    whole: the grid ends at t = 0, and the last step is masked out; else it is the first part of a grid twice
    as long. `fields`: of FlowRollout, in place of what is made here.
    """
    rng = np.random.default_rng((seed, sample))
    t_S = grid(steps if whole else 2 * steps, shift)[: steps + 1]
    mask_T = np.arange(steps) < steps - whole
    x_SD = rng.standard_normal((steps + 1, int(np.prod(shape)))).astype(np.float32)
    logp_T = rng.uniform(-9, -3, steps).astype(np.float32)
    behaviour = None
    if drawn_by is not None:
        x_SD, logp_T, v_TD = _trajectory(drawn_by, x_SD, t_S, text, noise_level, guidance)
        behaviour = VelocityTarget(
            teacher="behaviour", v_TD=np.where(mask_T[:, None], v_TD, np.float32(np.nan))
        )
    made: dict[str, Any] = {
        "prompt": Prompt(f"p{seed}", ({"role": "user", "content": text},), route=route),
        "sample": sample,
        "version": 0,
        "finish": "stop" if whole else "length",
        "mask_T": mask_T,
        "logp_T": np.where(mask_T, logp_T, np.float32(0)),
        "behaviour": behaviour,
        "x_SD": x_SD,
        "t_S": t_S,
        "noise_level": noise_level,
        "guidance": guidance,
        "image": np.zeros(shape[1:], np.uint8),
    }
    return FlowRollout(**{**made, **fields})


@torch.no_grad()
def _trajectory(
    drawn_by: FlowModel, noise_SD: np.ndarray, t_S: np.ndarray, text: str, noise_level: float, guidance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, log-densities and velocities of a trajectory whose first state and noise are `noise_SD`."""
    x_SD, logp_T, v_TD = noise_SD.copy(), np.zeros(len(t_S) - 1, np.float32), np.zeros_like(noise_SD[1:])
    for i, (t, dt) in enumerate(zip(t_S[:-1].tolist(), np.diff(t_S).tolist(), strict=True)):
        x_1D, t_1 = torch.from_numpy(x_SD[i : i + 1]), torch.tensor([t])
        v_TD[i] = drawn_by.velocity(x_1D, t_1, [text], guidance)[0].cpu().numpy()
        mean_D, std = step_moments(x_SD[i], v_TD[i], t, dt, noise_level)
        x_SD[i + 1] = mean_D + std * noise_SD[i + 1]
        logp_T[i] = step_logp(x_SD[i + 1], mean_D, std) if noise_level else 0.0
    return x_SD, logp_T, v_TD


def attempt(
    steps: int = 4, *, teacher: FlowModel | None = None, name: str = "main", **fields: Any
) -> Attempt:
    """An attempt along `rollout(steps, ...)`, with the word of `teacher` where one is given."""
    made = Attempt(rollout(steps, **fields))
    if teacher is not None:
        made.answers[name] = TeacherAnswer(target=velocities(teacher, made.rollout, name))
    return made


@torch.no_grad()
def velocities(of: FlowModel, along: Any, name: str = "main") -> VelocityTarget:
    """What a model says at the counted states of a rollout, one at a time; NaN elsewhere."""
    v_TD = np.full_like(along.x_SD[1:], np.nan)
    text = along.prompt.messages[-1]["content"]
    for i in np.flatnonzero(along.mask_T):
        x_1D, t_1 = torch.from_numpy(along.x_SD[i : i + 1]), torch.from_numpy(along.t_S[i : i + 1])
        v_TD[i] = of.velocity(x_1D, t_1, [text], along.guidance)[0].cpu().numpy()
    return VelocityTarget(teacher=name, v_TD=v_TD)
