"""A loaded flow model: its velocity, its grid of times, its images."""

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

# the folder of a prompt table
TABLE = "prompts"
# how far from 1 a grid's first time may be for a rounding
START = 1e-5


class Encoder(Protocol):
    """Text to what the transformer is told: (tokens_BLJ, pooled_BP)."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


class Decoder(Protocol):
    """Latent states to images, `factor` times as wide."""

    factor: int

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, height, width] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class FlowModel:
    """Times run from t = 1 (noise) to t = 0 (data): x_t = (1 - t) x_0 + t x_1, and the velocity estimates x_1
    - x_0.
    """

    net: FlowNet
    # the config of diffusers' FlowMatchEulerDiscreteScheduler
    scheduler: Mapping[str, Any]
    # of prompts; the net's own table, or text encoders whose answers are kept
    encode: Encoder
    # None: the state is the image
    decode: Decoder | None
    # where text encoders and decoder are: an absolute folder or a hub id
    source: str
    stored_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def channels(self) -> int:
        return self.net.transformer.config.in_channels

    def shape(self, pixels: int = 0) -> tuple[int, int, int]:
        """(channels, height, width) of a state whose image has `pixels` a side, 0: the size the model was
        made for. D is their product.

        ModelError for a size that is no whole number of patches, or of more patches than the transformer has
        places for.
        """
        config = self.net.transformer.config
        unit = config.patch_size * (self.decode.factor if self.decode else 1)
        if pixels % unit:
            raise ModelError(
                f"sampler.pixels = {pixels}: so wide an image is no whole number of patches. Choose a "
                f"multiple of {unit}."
            )
        # patches a side; None: places for any number are computed
        most = config.pos_embed_max_size
        if most and pixels > most * unit:
            raise ModelError(
                f"sampler.pixels = {pixels}: the model has places for {most} patches a side. Choose at most "
                f"{most * unit}."
            )
        side = pixels // unit * config.patch_size if pixels else config.sample_size
        return self.channels, side, side

    def grid(self, steps: int) -> np.ndarray:
        """The steps + 1 times of so many steps, 1 down to 0, as diffusers' scheduler gives them (its shift
        included). float64 [S].

        The first is 1 exactly, where diffusers' float32 may miss it by a rounding: `sde_step` has a rule of
        its own there. ModelError for a scheduler whose times begin elsewhere.
        """
        scheduler = library().FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler))
        scheduler.set_timesteps(steps)
        t_S = scheduler.sigmas.double().numpy()
        if not abs(t_S[0] - 1) <= START:
            raise ModelError(
                f"the model's scheduler begins at t = {t_S[0]:g}. Use a model whose times go from 1 (noise) "
                "to 0 (data)."
            )
        t_S[0] = 1.0
        return t_S

    def velocity(self, x_ND: Tensor, t_N: Tensor, texts: Sequence[str], guidance: float = 1.0) -> Tensor:
        """v_ND, float32, of N states at their own times and prompts; gradients flow into the net.

        guidance g other than 1: v_uncond + g (v_cond - v_uncond), both halves in one call (arXiv 2207.12598).
        """
        if guidance == 1:
            return self._velocity(x_ND, t_N, texts)
        both = self._velocity(x_ND.repeat(2, 1), t_N.repeat(2), [*texts, *[UNCONDITIONAL] * len(texts)])
        cond_ND, uncond_ND = both.chunk(2)
        return uncond_ND + guidance * (cond_ND - uncond_ND)

    def _velocity(self, x_ND: Tensor, t_N: Tensor, texts: Sequence[str]) -> Tensor:
        # each prompt is encoded once
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
        """Images, uint8, [height, width] where there is one channel, else [height, width, 3]. -1 is black and
        1 is white.
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
        """Multiply-accumulates of one velocity: parameters times what the transformer reads, patches and
        prompt tokens.
        """
        patches = (self.shape(pixels)[1] // self.net.transformer.config.patch_size) ** 2
        tokens = self.encode([UNCONDITIONAL])[0].shape[1]
        parameters = sum(parameter.numel() for parameter in self.net.transformer.parameters())
        return parameters * (patches + tokens) * (1 if guidance == 1 else 2)

    def save(
        self, folder: Path, dtype: torch.dtype | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """A diffusers folder that `load_flow` reads: transformer, scheduler, and the prompt table or the name
        of the encoders' model.

        weights: in place of the net's own, by its names; dtype: as stored where it is None.
        """
        dtype = dtype or self.stored_dtype
        whole = dict(self.net.state_dict() if weights is None else weights)
        prefix = "transformer."
        parts = {
            name.removeprefix(prefix): value.to(dtype)
            for name, value in whole.items()
            if name.startswith(prefix)
        }
        # a folder of this machine
        config = {key: value for key, value in self.net.transformer.config.items() if key != "_name_or_path"}
        with torch.device("meta"):
            # the plain module: the net's own may carry adapters
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
