"""Measures the README's quickstart table and figure again, on three seeds.

    python studies/quickstart.py --out runs/quickstart_table

Prints the table in the form of README.md and writes it to table.md in the folder of the runs, with the
summaries and the figure of the first seed (`--figure docs/quickstart.svg` replaces the figure of the README).
All accuracies of the table are on test problems (`evals.test_accuracy`). The figure's curve and its teacher
line are on validation problems. If the command is started again, it continues the runs. It refuses to
continue if the embedded models have changed, because one table must not mix runs of different students.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reflux
from reflux.config.recipe import RunConfig, load_recipe
from reflux.errors import RunError
from reflux.models.locations import locate
from reflux.storage.files import write_text

SEEDS = (0, 1, 2)
FIGURE = Path(__file__).parents[1] / "docs" / "figure.py"


def models(cfg: RunConfig) -> dict[str, str]:
    """The hashes of the weights of the student and its teachers, by model name."""
    names = {
        cfg.learner.student.model,
        *(name for teacher in cfg.teachers.values() for name in teacher.sources),
    }
    files = {name: sorted(Path(locate(name, name)).glob("*.safetensors")) for name in sorted(names)}
    return {
        name: hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()
        for name, found in files.items()
    }


def measured(out: Path, seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The summary of one run for each seed. RunError if the folder holds runs of other models."""
    known, now = out / "models.json", models(load_recipe("quickstart", overrides))
    if known.exists() and json.loads(known.read_text()) != now:
        raise RunError(
            f"{out} holds runs of other models than the current ones. Choose another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(known, json.dumps(now, indent=2) + "\n")
    summaries = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        resume = (folder / "config.toml").exists()
        summaries.append(reflux.run("quickstart", [*overrides, f"seed={seed}"], out=folder, resume=resume))
    return summaries


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """The table in the form of README.md. The student before training and the teacher are the same models for
    every seed.
    """
    first, rest = summaries[0], len(summaries) - 1
    problems, split = first["accuracy_before"]["problems"], first["accuracy_before"]["split"]
    rows = [
        [
            f"`make quickstart`, {problems} {split} problems, greedy",
            *(f"seed {summary['seed']}" for summary in summaries),
        ],
        ["student before", shown(first["accuracy_before"]), *["the same model"] * rest],
        [
            f"student after {first['steps']} steps",
            *(shown(summary["accuracy_after"]) for summary in summaries),
        ],
        ["teacher", shown(first["teacher_accuracy"]), *[""] * rest],
    ]
    lines = [("| " + " | ".join(row) + " |").replace("|  |", "| |").replace("|  |", "| |") for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    seconds = [summary["seconds"] for summary in summaries]
    made = f"commit {first['commit']}, config {first['config_hash']} at seed {first['seed']}"
    lines.append(
        f"\n95 % intervals (Wilson); {made}. {min(seconds):.0f} to {max(seconds):.0f} seconds, start to "
        "finish."
    )
    return "\n".join(lines)


def shown(score: dict[str, Any]) -> str:
    """A score in the form `89.8 % (86.8 to 92.2)`."""
    value, low, high = (
        f"{100 * score[name]:.1f}".replace("100.0", "100") for name in ("accuracy", "low", "high")
    )
    return f"{value} % ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the runs, the table and the figure"
    )
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas between")
    parser.add_argument(
        "--figure", type=Path, help="file for the figure (default: quickstart.svg in the folder of the runs)"
    )
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as for `reflux run`")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    summaries = measured(asked.out, seeds, asked.overrides)
    write_text(asked.out / "summaries.json", json.dumps(summaries, indent=2) + "\n")
    write_text(asked.out / "table.md", table(summaries) + "\n")
    print(table(summaries))
    figure = asked.figure or asked.out / "quickstart.svg"
    subprocess.run(
        [sys.executable, str(FIGURE), str(asked.out / f"seed-{seeds[0]}"), str(figure)], check=True
    )


if __name__ == "__main__":
    main()
