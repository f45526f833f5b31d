"""A loaded flow model, with its velocity, its grid of times and its images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.net import UNCONDITIONAL, FlowNet

# the name of the folder of a prompt table
TABLE = "prompts"
# largest rounding error of a grid's first time, which is 1
START = 1e-5


def copies(guidance: float) -> int:
    """The rows that the transformer gets for one state: with guidance one with its prompt and one without."""
    return 1 if guidance == 1 else 2


class Encoder(Protocol):
    """Maps prompts to the inputs of the transformer: (tokens_BLJ, pooled_BP)."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


class Decoder(Protocol):
    """Maps latent states to images, which are `factor` times as wide."""

    factor: int

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, height, width] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class FlowModel:
    """A flow model. Times run from t = 1 (noise) to t = 0 (data), with x_t = (1 - t) x_0 + t x_1. The
    velocity estimates x_1 - x_0.
    """

    net: FlowNet
    # the config of diffusers' FlowMatchEulerDiscreteScheduler
    scheduler: Mapping[str, Any]
    # encodes prompts: the net's own table, or text encoders with a cache
    encode: Encoder
    # None where the state is the image
    decode: Decoder | None
    # where the text encoders and the decoder are: an absolute folder or a hub id
    source: str
    # the dtype of its files; exports use it
    stored_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def channels(self) -> int:
        return self.net.transformer.config.in_channels

    def shape(self, pixels: int = 0) -> tuple[int, int, int]:
        """(channels, height, width) of a state whose image has `pixels` per side; 0 is the size that the
        model was made for. D is their product.

        ModelError for a size that is not a whole number of patches, or that has more patches than the
        transformer has position embeddings for.
        """
        config = self.net.transformer.config
        unit = config.patch_size * (self.decode.factor if self.decode else 1)
        if pixels % unit:
            raise ModelError(
                f"sampler.pixels = {pixels}: an image of this width is not a whole number of patches. "
                f"Choose a multiple of {unit}."
            )
        # patches per side; None where the position embeddings are computed for any number
        most = config.pos_embed_max_size
        if most and pixels > most * unit:
            raise ModelError(
                f"sampler.pixels = {pixels}: the model has position embeddings for {most} patches per side. "
                f"Choose at most {most * unit}."
            )
        side = pixels // unit * config.patch_size if pixels else config.sample_size
        return self.channels, side, side

    def grid(self, steps: int) -> np.ndarray:
        """The S = steps + 1 times of `steps` steps, from 1 down to 0, as diffusers' scheduler gives them
        (with its shift). float64 [S].

        The first time is set to exactly 1, because diffusers' float32 may differ by rounding and `sde_step`
        treats t = 1 separately. ModelError for a scheduler whose first time is not 1.
        """
        scheduler = library().FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler))
        scheduler.set_timesteps(steps)
        t_S = scheduler.sigmas.double().numpy()
        if not abs(t_S[0] - 1) <= START:
            raise ModelError(
                f"the first time of the model's scheduler is t = {t_S[0]:g}. Use a model whose times go from "
                "1 (noise) to 0 (data)."
            )
        t_S[0] = 1.0
        return t_S

    def velocity(self, x_ND: Tensor, t_N: Tensor, texts: Sequence[str], guidance: float = 1.0) -> Tensor:
        """v_ND, float32, of N states x_ND, each at its own time and prompt (`texts`). Gradients flow into the
        net.

        For a guidance g other than 1 it is v_uncond + g (v_cond - v_uncond), with both halves in one call
        (arXiv 2207.12598).
        """
        if copies(guidance) == 1:
            return self._velocity(x_ND, t_N, texts)
        both = self._velocity(x_ND.repeat(2, 1), t_N.repeat(2), [*texts, *[UNCONDITIONAL] * len(texts)])
        cond_ND, uncond_ND = both.chunk(2)
        return uncond_ND + guidance * (cond_ND - uncond_ND)

    def _velocity(self, x_ND: Tensor, t_N: Tensor, texts: Sequence[str]) -> Tensor:
        # Each prompt is encoded only once.
        names = list(dict.fromkeys(texts))
        row = {text: index for index, text in enumerate(names)}
        tokens_BLJ, pooled_BP = self.encode(names)
        rows_N = torch.tensor([row[text] for text in texts], device=self.device)
        dtype = self.net.dtype
        v = self.net.transformer(
            hidden_states=self._square(x_ND).to(dtype),
            timestep=t_N.to(self.device, torch.float32) * self.scheduler["num_train_timesteps"],
            encoder_hidden_states=tokens_BLJ.to(self.device, dtype)[rows_N],
            pooled_projections=pooled_BP.to(self.device, dtype)[rows_N],
            return_dict=False,
        )[0]
        return v.flatten(1).float()

    @torch.no_grad()
    def images(self, x_ND: Tensor) -> list[np.ndarray]:
        """The images of the states x_ND, uint8, [height, width] where there is one channel, else [height,
        width, 3]. -1 is black and 1 is white.
        """
        x_NCHW = self._square(x_ND)
        images = x_NCHW if self.decode is None else self.decode(x_NCHW)
        levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        return [level[0] if len(level) == 1 else level.transpose(1, 2, 0) for level in levels]

    def _square(self, x_ND: Tensor) -> Tensor:
        side = math.isqrt(x_ND.shape[1] // self.channels)
        return x_ND.to(self.device).unflatten(1, (self.channels, side, side))

    @torch.no_grad()
    def macs(self, guidance: float = 1.0, pixels: int = 0) -> int:
        """Multiply-accumulates of one velocity at a state whose image has `pixels` per side: parameters times
        the number of patches and prompt tokens that the transformer reads, and twice that with guidance.
        """
        patches = (self.shape(pixels)[1] // self.net.transformer.config.patch_size) ** 2
        tokens = self.encode([UNCONDITIONAL])[0].shape[1]
        parameters = sum(parameter.numel() for parameter in self.net.transformer.parameters())
        return parameters * (patches + tokens) * copies(guidance)

    def save(
        self, folder: Path, dtype: torch.dtype | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save a diffusers folder that `load_flow` reads: the transformer, the scheduler, and the prompt
        table or the name of the encoders' model.

        weights: saved instead of the net's own weights, under the same names. dtype None is the dtype of
        the model's files.
        """
        dtype = dtype or self.stored_dtype
        whole = dict(self.net.state_dict() if weights is None else weights)
        prefix = "transformer."
        parts = {
            name.removeprefix(prefix): value.to(dtype)
            for name, value in whole.items()
            if name.startswith(prefix)
        }
        # "_name_or_path" is left out, because it is a path on this machine.
        config = {key: value for key, value in self.net.transformer.config.items() if key != "_name_or_path"}
        with torch.device("meta"):
            # A new module is saved, because the net's own module may have adapters.
            plain = library().SD3Transformer2DModel.from_config(config)
        plain.load_state_dict(parts, assign=True)
        plain.save_pretrained(folder / "transformer")
        library().FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler)).save_pretrained(
            folder / "scheduler"
        )
        index: dict[str, Any] = {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        }
        if self.net.prompts is None:
            index["_encoders"] = self.source
        else:
            self.net.prompts.save(folder / TABLE, dtype, whole["prompts.rows.weight"])
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
