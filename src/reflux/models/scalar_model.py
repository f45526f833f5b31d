"""A language model with one output in place of its head: a number for each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from reflux.models.cut import cut
from reflux.models.placement import autocast
from reflux.models.text import Model
from reflux.models.text_rows import padded


class ScalarModel:
    """score(text) = w . h, where h [H] is the trunk's hidden state (after its last norm) at the last token.

    w begins at 0, so every text has the score 0 at first. There is no bias: it would cancel in every
    difference of two scores. w and the score are float32, or float64 if the model is.
    """

    def __init__(self, model: Model, precision: str = "off"):
        """precision: as the key `autocast` of a recipe."""
        self.model, self.precision = model, precision
        # The width of what the output head reads, which is not the width of the embedding in every model.
        weight_VH = model.head.module.weight
        assert isinstance(weight_VH, Tensor)
        self.weight_H = nn.Parameter(torch.zeros_like(weight_VH[0]).detach())

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters of trunk and output, by name. The head of the language model is not used."""
        trunk = self.model.trunk.named_parameters()
        return {"score": self.weight_H, **{f"trunk.{name}": parameter for name, parameter in trunk}}

    def scores(self, texts: Sequence[np.ndarray]) -> Tensor:
        """The scores [B] of B texts, from one forward pass; differentiable. texts: token ids."""
        rows = padded(texts, self.model.device)
        with autocast(self.precision, self.model.device):
            h_NH = rows.states(self.model.trunk)
        last = [start + len(text) - 1 for start, text in zip(rows.starts, texts, strict=True)]
        return h_NH[last].to(self.weight_H) @ self.weight_H

    def parts(self, texts: Sequence[np.ndarray], tokens: int) -> Iterator[list[int]]:
        """The indices of the texts in parts of at most `tokens` tokens, padding included. Each part has at
        least one text.
        """
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        for part in cut([len(texts[index]) for index in order], lambda: tokens, pack=False):
            yield order[part]

    @torch.no_grad()
    def measured(self, texts: Sequence[np.ndarray], tokens: int) -> Tensor:
        """As `scores`, without a gradient, in parts of at most `tokens` tokens."""
        found_N = torch.zeros(len(texts), dtype=self.weight_H.dtype, device=self.weight_H.device)
        for part in self.parts(texts, tokens):
            found_N[part] = self.scores([texts[index] for index in part])
        return found_N

    def backward(self, texts: Sequence[np.ndarray], slopes_N: Tensor, tokens: int) -> None:
        """Add sum_n slope_n * d score_n / d parameter to the gradients, in parts of at most `tokens` tokens.
        With the slopes d loss / d score_n this is the gradient of the loss, however texts are divided.
        """
        for part in self.parts(texts, tokens):
            (self.scores([texts[index] for index in part]) * slopes_N[part]).sum().backward()
