"""Writes report.html: the results of one run on one page that opens offline. It reads the run directory only.

Images are decoded and encoded again. `rendering` says what keeps a page safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflux.reports.asked import sentence
from reflux.reports.attempts import read_attempts
from reflux.reports.chat_tables import CHAT_HEADER, chat_table
from reflux.reports.costs import flops_chart, other_costs, roles_table, seconds_chart, tokens_chart
from reflux.reports.curves import accuracy_chart, kl_chart, position_chart
from reflux.reports.diagnostics import own_charts
from reflux.reports.evals import read_evals
from reflux.reports.examples import read_pairs
from reflux.reports.formatting import visible
from reflux.reports.metrics import read_metrics
from reflux.reports.overview import overview
from reflux.reports.reading import json_table, rows, toml_table
from reflux.reports.recorded import Recorded
from reflux.reports.rendering import rendered
from reflux.reports.splits import split_charts
from reflux.reports.steps import outside_chart, variance_chart
from reflux.reports.strips import read_strips
from reflux.reports.teacher_tables import HEADER, teachers_table
from reflux.reports.tokens import legend, open_tokenizer
from reflux.reports.trajectories import RATIO, trajectory
from reflux.reports.views import view
from reflux.reports.words import words_for
from reflux.storage import files


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory and return its path.

    Reads config.toml, metrics.jsonl, evals.jsonl, searches.jsonl, attempts.jsonl, summary.json and
    student/tokenizer.json. Any of them may be missing; the page lists what is missing or damaged. The file is
    replaced atomically. FileNotFoundError if there is no such directory.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"{run_dir} is not a run directory. Pass the folder that `reflux run` printed."
        )
    target = run_dir / "report.html"
    page = _page(run_dir)
    files.write_text(target, rendered("page.html", page, [*page["progress"], *page["costs"]]))
    return target


def _page(run_dir: Path) -> dict[str, Any]:
    notes: list[str] = []
    config = toml_table(run_dir / "config.toml", notes)
    summary = json_table(run_dir / "summary.json", notes)
    metrics = read_metrics(rows(run_dir / "metrics.jsonl", notes))
    moments = read_evals(rows(run_dir / "evals.jsonl", notes))
    attempts = read_attempts(run_dir / "attempts.jsonl", notes)
    words = words_for(config, [shown.acted for shown in attempts], moments)
    tokenizer = (
        open_tokenizer(run_dir / "student" / "tokenizer.json", notes)
        if attempts and not words.images
        else None
    )
    head = overview(config, summary, metrics, moments, run_dir.resolve().name)
    pairs, first_step, last_step = read_pairs(moments)
    return {
        "head": head,
        "words": words,
        "asked": sentence((score.split for moment in moments for score in moment.scores.values()), "prompts"),
        "strips": read_strips(moments) if words.images else [],
        "progress": [
            accuracy_chart(moments, head.scores[-1][1]),
            kl_chart(metrics, moments, words),
            position_chart(moments, words),
            *split_charts(moments),
            *(chart for chart in (variance_chart(metrics), outside_chart(metrics)) if chart is not None),
            *own_charts(config, Recorded(run_dir), notes),
        ],
        "teachers": teachers_table(config, metrics.teachers),
        "teachers_header": HEADER,
        "costs": [seconds_chart(metrics), flops_chart(metrics), tokens_chart(metrics, words)],
        "roles": roles_table(metrics),
        "chat": chat_table(metrics.chat),
        "chat_header": CHAT_HEADER,
        "other_costs": other_costs(metrics, words),
        "attempts": [trajectory(shown) if words.images else view(shown, tokenizer) for shown in attempts],
        "ratio": RATIO,
        "pairs": pairs,
        "pair_steps": (first_step, last_step),
        "legend": legend(),
        "config": visible(_text(run_dir / "config.toml")),
        "notes": notes,
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
