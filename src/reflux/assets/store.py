"""Writes a model folder in Hugging Face format (safetensors only). The folder is complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.storage.files import write_folder

if TYPE_CHECKING:
    from reflux.assets.specs import ModelSpec

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# Reflux {name}

A {role} for {asked}: Qwen3 architecture, one character a token, \
trained from {origin} on worked solutions
(never on another model's output). Made by `python -m reflux.assets.make --only {name}`.

{report}
"""


def save(model: Any, tokenizer: Any, spec: ModelSpec, report: list[str], out: Path) -> None:
    """Write model, tokenizer and card as one folder that is complete or absent. report: lines of the card."""

    def fill(scratch: Path) -> None:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        role = spec.name.replace("_", " ")
        origin = f"`reflux:{spec.start}`" if spec.start else "nothing"
        lines = "\n".join(f"- {line}" for line in report)
        (scratch / "README.md").write_text(
            CARD.format(name=spec.name, role=role, asked=spec.asked, origin=origin, report=lines)
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
