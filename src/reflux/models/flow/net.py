"""The network of a flow model: diffusers' transformer and, where the model has learned its prompts, the
prompt table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reflux.errors import DataError

# the empty prompt, for the unconditional half of guidance
UNCONDITIONAL = ""


class PromptTable(nn.Module):
    """One learned embedding per known prompt: `length` tokens of width J and one pooled vector of width P.
    Row 0 is the empty prompt.
    """

    def __init__(self, texts: Sequence[str], length: int, width: int, pooled: int):
        super().__init__()
        if not texts or texts[0] != UNCONDITIONAL or len(set(texts)) < len(texts):
            raise ValueError("a prompt table must begin with the empty prompt and have every prompt once")
        self.texts, self.length, self.width = tuple(texts), length, width
        self.rows = nn.Embedding(len(texts), length * width + pooled)
        self._row = {text: row for row, text in enumerate(texts)}

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens_BLJ, pooled_BP) of these prompts. DataError for a prompt that is not in this table."""
        unknown = [text for text in texts if text not in self._row]
        if unknown:
            raise DataError(
                f"this model has a table of {len(self.texts)} learned prompts, and '{unknown[0]}' is not "
                "in it. The table has: "
                f"{', '.join(repr(text) for text in self.texts[1:9])}, ..."
            )
        table_BE = self.rows(
            torch.tensor([self._row[text] for text in texts], device=self.rows.weight.device)
        )
        tokens_BE, pooled_BP = table_BE.split(
            [self.length * self.width, table_BE.shape[1] - self.length * self.width], dim=1
        )
        return tokens_BE.unflatten(1, (self.length, self.width)), pooled_BP

    def save(self, folder: Path, dtype: torch.dtype, rows: Tensor | None = None) -> None:
        """Write prompts.json and prompts.safetensors. rows: saved instead of the table's own weights."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"texts": self.texts, "length": self.length, "width": self.width}
        (folder / "prompts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        kept = self.rows.weight if rows is None else rows
        save_file(
            {"rows.weight": kept.detach().to("cpu", dtype).contiguous()}, folder / "prompts.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> PromptTable:
        facts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "prompts.safetensors")
        pooled = weights["rows.weight"].shape[1] - facts["length"] * facts["width"]
        table = cls(facts["texts"], facts["length"], facts["width"], pooled)
        table.load_state_dict({key: value.float() for key, value in weights.items()})
        return table


class FlowNet(nn.Module):
    """The modules that are trained, published and saved together: `transformer`, and `prompts` where there is
    a prompt table.
    """

    def __init__(self, transformer: Any, prompts: PromptTable | None = None):
        super().__init__()
        self.transformer = transformer
        self.prompts = prompts

    @property
    def device(self) -> torch.device:
        # diffusers' own property visits all modules, which would happen at every denoising step.
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype
