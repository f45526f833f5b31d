"""The commands take a GGUF file as they take a folder, and show no other library's progress bar."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny_gguf

CODE = """
import sys
from reflux.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as ended:
    sys.exit(ended.code)
"""


def command(folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "it/s" not in ended.stderr
    return ended.stdout


def test_eval_difficulty_and_doctor(tmp_path: Path) -> None:
    tiny_gguf.write(
        tmp_path / "s.gguf", tiny_gguf.llama(0, max_position_embeddings=512), "Q8_0", pre="smollm"
    )
    tiny_gguf.write(tmp_path / "t.gguf", tiny_gguf.llama(1, max_position_embeddings=512), "F32", pre="smollm")
    rows = [{"question": f"{n} + {n}?\n\n", "answer": f"#### {2 * n}"} for n in range(200)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["task.path=.", "threads=1"]
    recipe = ["smollm", "learner.model=s.gguf", "teachers.main.model=t.gguf", "sampler.max_tokens=8", *task]
    sets = [word for change in task for word in ("--set", change)]
    shown = command(
        tmp_path, "eval", "s.gguf", "--task", "gsm8k", "--problems", "4", "--max-tokens", "8", *sets
    )
    assert "accuracy" in shown
    command(tmp_path, "difficulty", *recipe, "--samples", "2", "--prompts", "4", "--out", "hard")
    assert len((tmp_path / "hard" / "difficulty.jsonl").read_text().splitlines()) == 4
    found = command(tmp_path, "doctor", *recipe)
    assert "failed" not in found
    assert "parity: the log-probs of sampler and learner differ by at most" in found
