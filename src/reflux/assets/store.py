"""Writes a model folder in Hugging Face format, safetensors only, so that a reader never sees half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflux.files import write_folder

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# Reflux {name}

A {name} for the toy task `word_problems`: Qwen3 architecture, one character a token, trained from nothing on worked solutions
(never on another model's output). Made by `python -m reflux.assets.make --only {name}`.

{report}
"""


def save(model: Any, tokenizer: Any, name: str, report: list[str], out: Path) -> None:
    """Write model, tokenizer and card as one folder that is whole or absent."""

    def fill(scratch: Path) -> None:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(CARD.format(name=name, report="\n".join(f"- {line}" for line in report)))

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
