"""The README's figure from a run directory: `python docs/figure.py runs/quickstart` writes
docs/quickstart.svg.

A second argument names another file to write. The curve and the teacher's line are on the problems of
`evals.accuracy`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reflux.storage.files import read_lines, write_text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 640, 260, 56, 16, 40, 110
GREY, BLUE, ORANGE = "#6b7280", "#2563eb", "#c2410c"


def figure(run: Path) -> str:
    """The figure as SVG: accuracy by step with its 95 % interval, and the teacher's accuracy."""
    rows = [row for row in read_lines(run / "evals.jsonl") if "accuracy" in row]
    last = rows[-1]["step"] or 1
    teacher = next((row["teacher_accuracy"]["accuracy"] for row in rows if "teacher_accuracy" in row), None)

    def place(step: float, share: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
        return f"{x:.1f},{y:.1f}"

    def line(points: list[str], colour: str, dash: str = "") -> str:
        return (
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )

    def words(step: float, share: float, text: str, colour: str, anchor: str, dx: int, dy: int) -> str:
        x, y = place(step, share).split(",")
        return (
            f'<text x="{x}" y="{y}" dx="{dx}" dy="{dy}" fill="{colour}" text-anchor="{anchor}">{text}</text>'
        )

    band = [place(row["step"], row["accuracy"]["high"]) for row in rows]
    band += [place(row["step"], row["accuracy"]["low"]) for row in reversed(rows)]
    after = rows[-1]["accuracy"]["accuracy"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *(line([place(0, share), place(last, share)], "#e5e7eb") for share in (0, 0.25, 0.5, 0.75, 1)),
        *(words(0, share, f"{share:.0%}", GREY, "end", -8, 4) for share in (0, 0.25, 0.5, 0.75, 1)),
        *(words(row["step"], 0, str(row["step"]), GREY, "middle", 0, 18) for row in rows),
        words(last / 2, 0, "optimiser step", GREY, "middle", 0, 35),
        f'<polygon points="{" ".join(band)}" fill="{BLUE}" opacity="0.15"/>',
        line([place(row["step"], row["accuracy"]["accuracy"]) for row in rows], BLUE),
        words(last, after, f"student {after:.1%}", BLUE, "start", 8, 12),
    ]
    if teacher is not None:
        parts += [
            line([place(0, teacher), place(last, teacher)], ORANGE, "6 4"),
            words(last, teacher, f"teacher {teacher:.0%}", ORANGE, "start", 8, 0),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("quickstart.svg")
    write_text(target, figure(Path(sys.argv[1])))
