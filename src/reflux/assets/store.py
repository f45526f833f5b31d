"""Writes a model folder in Hugging Face format (safetensors only). The folder is complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflux.storage.files import write_folder

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# Reflux {name}

A {role} for the toy task `word_problems`: Qwen3 architecture, one character a token, \
trained from {origin} on worked solutions
(never on another model's output). Made by `python -m reflux.assets.make --only {name}`.

{report}
"""


def save(model: Any, tokenizer: Any, name: str, report: list[str], out: Path, start: str = "") -> None:
    """Write model, tokenizer and card as one folder that is complete or absent. name: of the model. report:
    the lines of the card. start: the shipped model from which the training started, if any.
    """

    def fill(scratch: Path) -> None:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        role, origin = name.replace("_", " "), f"`reflux:{start}`" if start else "nothing"
        lines = "\n".join(f"- {line}" for line in report)
        (scratch / "README.md").write_text(CARD.format(name=name, role=role, origin=origin, report=lines))

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
