"""The frozen text encoders and decoder of Stable Diffusion 3. The encodings of prompts are cached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# number of prompts whose encodings are cached: about 3 MB each in 16 bits (stored so on a GPU), twice as
# much in 32 bits (on a CPU)
KEPT = 512


class TextEncoders:
    """diffusers' `encode_prompt` of a pipeline that was loaded without transformer and decoder. The
    encodings are on the CPU.

    Several threads may call it (sampler, teachers and learner share one). The calls run one at a time.
    """

    def __init__(self, pipeline: Any, device: str, kept: int = KEPT):
        self._pipeline, self._device, self._kept = pipeline, torch.device(device), kept
        self._answers: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._turn = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens_BLJ, pooled_BP). Only prompts that are not cached are encoded. A call may have more
        prompts than the cache holds.
        """
        with self._turn:
            found = self._found(texts)
        return torch.stack([found[text][0] for text in texts]), torch.stack(
            [found[text][1] for text in texts]
        )

    def _found(self, texts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._answers]
        found = {text: self._answers[text] for text in texts if text in self._answers}
        found |= {text: self._encode(text) for text in missing}
        for text, answer in found.items():
            self._answers[text] = answer
            self._answers.move_to_end(text)
        while len(self._answers) > self._kept:
            self._answers.popitem(last=False)
        return found

    @torch.no_grad()
    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        tokens_1LJ, _, pooled_1P, _ = self._pipeline.encode_prompt(
            prompt=text, prompt_2=text, prompt_3=text, device=self._device, do_classifier_free_guidance=False
        )
        return tokens_1LJ[0].cpu(), pooled_1P[0].cpu()


class LatentDecoder:
    """The decoder of diffusers' AutoencoderKL, with its scale and shift."""

    def __init__(self, vae: Any):
        self._vae = vae.requires_grad_(False)
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        config = self._vae.config
        latents = x_BCHW / config.scaling_factor + (config.shift_factor or 0.0)
        return torch.cat(
            [self._vae.decode(one.to(self._vae.dtype), return_dict=False)[0] for one in latents.split(1)]
        )
