"""Writes a model folder in Hugging Face format, safetensors only, so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

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
    """Write everything to a temporary folder beside `out`, sync it, then put it in the place of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    model.save_pretrained(fresh, safe_serialization=True)
    tokenizer.save_pretrained(fresh)
    (fresh / "README.md").write_text(CARD.format(name=name, report="\n".join(f"- {line}" for line in report)))
    for path in fresh.iterdir():
        path.chmod(0o644)  # whoever installs it, everyone may read it
        sync(path)
    fresh.chmod(0o755)
    sync(fresh)
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)
    sync(out.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
