"""Where along an answer the reverse KL to the teacher lies, before training and after each arm of a study.

    python studies/positions.py OUT [--arms full,schedule] [--figure FILE.svg]

OUT is the folder of studies/run.py. Every run of it evaluates `agreement` on the student's own held-out
answers, which are never cut. Printed for each part of the answer: the share of all tokens that lie in it, the
KL in nats per token (a mean over tokens), and the share of the summed KL that lies in this part or before it.
Seeds are pooled, and each token counts once. --figure draws the KL by position.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from reflux.storage.files import read_lines

# first token of a part: [number of tokens, sum of their KL in nats]
Parts = dict[int, np.ndarray]
BEFORE = "before"


def by_position(runs: Iterable[Path], row: int, width: int) -> Parts:
    """Evaluation number `row` of the runs, in parts of `width` tokens. A bin of an evaluation counts in the
    part in which it begins.
    """
    parts: Parts = {}
    for run in runs:
        rows = [line["agreement"] for line in read_lines(run / "evals.jsonl") if line.get("agreement")]
        for part in rows[row]["by_position"] if rows else ():
            first = part["position"] // width * width
            parts.setdefault(first, np.zeros(2))
            parts[first] += (part["tokens"], part["tokens"] * part["kl_nats"])
    return dict(sorted(parts.items()))


def finished(arm: Path) -> list[Path]:
    return [run for run in sorted(arm.glob("seed-*")) if (run / "summary.json").exists()]


def table(courses: Mapping[str, Parts], width: int) -> str:
    head = ["tokens"]
    for name in courses:
        head += [f"{name}: tokens", "KL", "of the sum"]
    rows = [head, ["---"] * len(head)]
    so_far = dict.fromkeys(courses, 0.0)
    for first in sorted({first for parts in courses.values() for first in parts}):
        cells = [f"{first} to {first + width - 1}"]
        for name, parts in courses.items():
            count, nats = parts.get(first, np.zeros(2))
            tokens, total = np.sum(list(parts.values()), axis=0)
            so_far[name] += nats / total
            cells += [f"{count / tokens:.1%}", f"{nats / count:.3f}" if count else "", f"{so_far[name]:.1%}"]
        rows.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(courses: Mapping[str, Parts], width: int, path: Path) -> None:
    from figures import GREY, axes, save

    figure, ax = axes("token of the answer", "reverse KL to the teacher, nats a token")
    for name, parts in courses.items():
        middles = [first + width / 2 for first in parts]
        style = {"color": GREY, "linestyle": "--"} if name == BEFORE else {}
        ax.plot(middles, [nats / count for count, nats in parts.values()], label=name, **style)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["full"])
    parser.add_argument("--width", type=int, default=17, help="tokens of a part (17)")
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args(arguments)
    runs = {name: finished(asked.out / name) for name in asked.arms}
    absent = [name for name, found in runs.items() if not found]
    if absent:
        sys.exit(f"{asked.out} has no finished run of {', '.join(absent)}")
    courses = {BEFORE: by_position(runs[asked.arms[0]], 0, asked.width)}
    courses |= {name: by_position(found, -1, asked.width) for name, found in runs.items()}
    print(table(courses, asked.width))
    if asked.figure:
        draw(courses, asked.width, asked.figure)


if __name__ == "__main__":
    main()
