"""Measures whether a reader separates right from wrong attempts better if its prompt shows other attempts.
There is no training.

    python studies/peer_signal.py --out runs/peer_signal [--reader reflux:reader] [--student reflux:reader]
                                  [--prompts 400] [--group 8]

The student answers each problem `group` times. The frozen reader gives every attempt a mean log-prob per
token in each context. Per problem this score is compared with the verdicts. auc: the probability that a right
attempt has a higher score than a wrong one (ties count half), 0.5 for no signal. rank: Spearman's correlation
of score and verdict. top: the share of problems where the attempt with the highest score is right. Only
problems with at least two right and two wrong attempts count, so that every attempt can be shown a block.
Intervals: 95 %, bootstrap over problems; `minus plain` is paired by problem.

twins: attempts whose prompt shows an identical text from another attempt. `auc, no twin` leaves these
attempts out, so that it does not measure copying. Written to OUT: peer_signal.json and peer_signal.md; both
are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from random_peers import RandomPeers
from scipy.stats import rankdata
from table import grid

from reflux.config.recipe import config_hash, load_recipe
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, StepContext
from reflux.contexts.base import TeacherPrompt, retold
from reflux.contexts.peers import Peers
from reflux.contexts.same import Same
from reflux.contexts.wording import with_attempts
from reflux.loop import lasting, open_parts
from reflux.metrics.intervals import bootstrap_mean
from reflux.storage.files import write_text
from reflux.storage.summary import commit
from reflux.teachers.base import TeacherRequest
from reflux.training import Options, Run
from reflux.types import Attempt, Group, HiddenTarget, Rollout, TeacherAnswer, TokenRollout

Context = Callable[[Group, StepContext], list[TeacherPrompt | None]]
CONTEXTS: dict[str, Context] = {
    "plain": Same(),
    "1S": Peers(1, 0),
    "2S": Peers(2, 0),
    "1F": Peers(0, 1),
    "2S1F": Peers(2, 1),
    "random 2+1": RandomPeers(2, 1),
}
FOREIGN = "2S of another problem"


@dataclass(frozen=True)
class Asked:
    out: Path
    reader: str
    student: str
    prompts: int
    group: int
    seed: int
    threads: int


async def draw(asked: Asked, run: Run, sampler: Any) -> list[Group]:
    prompts = list(islice(run.task.prompts("train", asked.seed), asked.prompts))
    how = SamplingParams(0, "train", run.cfg.training_positions, cohort=len(prompts))
    return list(await asyncio.gather(*(sampler.sample(prompt, asked.group, how) for prompt in prompts)))


def mixed(group: Group) -> bool:
    """True if the group has at least two right and two wrong attempts."""
    right = [attempt.verdict >= 0.5 for attempt in group if attempt.verdict is not None]
    return 2 <= sum(right) <= len(right) - 2


def foreign(groups: Sequence[Group]) -> list[list[TeacherPrompt | None]]:
    """For every group, two right attempts at the next group's problem."""
    views: list[list[TeacherPrompt | None]] = []
    for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
        shown = [spoken(attempt).text for attempt in other if (attempt.verdict or 0) >= 0.5][:2]
        messages = retold(
            group[0].rollout.prompt.messages, lambda problem, shown=shown: with_attempts(problem, shown, [])
        )
        views.append([TeacherPrompt(messages, notes={"twin_fraction": 0.0})] * len(group))
    return views


def spoken(attempt: Attempt) -> TokenRollout:
    assert isinstance(attempt.rollout, TokenRollout)
    return attempt.rollout


async def scores(
    teacher: Any, groups: Sequence[Group], views: list[list[TeacherPrompt | None]], requirements: Requirements
) -> list[np.ndarray]:
    """The mean log-prob per token of each attempt in nats. NaN if the reader was not asked about it."""
    pairs = [
        (a, view)
        for group, some in zip(groups, views, strict=True)
        for a, view in zip(group, some, strict=True)
        if view
    ]
    answers = await teacher.score(
        [TeacherRequest(attempt.rollout, view, requirements) for attempt, view in pairs]
    )
    found = {
        id(attempt): mean_logp(attempt.rollout, answer)
        for (attempt, _), answer in zip(pairs, answers, strict=True)
    }
    return [np.array([found.get(id(attempt), np.nan) for attempt in group]) for group in groups]


def mean_logp(rollout: Rollout, answer: TeacherAnswer) -> float:
    target = answer.target
    assert isinstance(target, HiddenTarget)
    assert target.logp_T is not None
    return float(target.logp_T[rollout.mask_T].mean())


def auc(score_G: np.ndarray, right_G: np.ndarray) -> float:
    """The probability that a right attempt has a higher score than a wrong one; ties count half. NaN without
    such a pair.
    """
    known = ~np.isnan(score_G)
    ranks, right = rankdata(score_G[known]), right_G[known]
    n, m = int(right.sum()), int((~right).sum())
    return float((ranks[right].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def measure(score_G: np.ndarray, right_G: np.ndarray, twin_G: np.ndarray) -> dict[str, float]:
    best = score_G == np.nanmax(score_G)
    flat = np.nanmax(score_G) == np.nanmin(score_G)
    return {
        "auc": auc(score_G, right_G),
        "auc_no_twin": auc(np.where(twin_G > 0, np.nan, score_G), right_G),
        "rank": 0.0 if flat else float(np.corrcoef(rankdata(score_G), rankdata(right_G))[0, 1]),
        "top": float(right_G[best].mean()),
        "twins": float(twin_G.mean()),
    }


def summed(rows: list[dict[str, float]], plain: list[dict[str, float]], seed: int) -> dict[str, Any]:
    """The mean of each measure over problems and its difference to the plain prompt, with intervals."""
    found: dict[str, Any] = {}
    for key in rows[0]:
        gains = [row[key] - without[key] for row, without in zip(rows, plain, strict=True)]
        for name, values in ((key, [row[key] for row in rows]), (f"{key}_minus_plain", gains)):
            known = [value for value in values if not np.isnan(value)]
            low, high = bootstrap_mean(known, seed) if known else (None, None)
            found[name] = {
                "mean": float(np.mean(known)) if known else None,
                "low": low,
                "high": high,
                "problems": len(known),
            }
    return found


async def signal(asked: Asked) -> dict[str, Any]:
    teacher = {"kind": "local", "model": asked.reader, "dtype": "float32"}
    changes = {
        "learner.model": asked.student,
        "teachers.main": teacher,
        "seed": asked.seed,
        "group_size": asked.group,
    }
    cfg = load_recipe("peers", {**changes, "prompts_per_step": asked.prompts, "threads": asked.threads})
    with tempfile.TemporaryDirectory() as scratch:
        run = Run.open(cfg, Requirements(logp=True, spans=True, reward=True), Options(Path(scratch) / "run"))
        async with (
            lasting(run),
            open_parts(cfg, run.context, run.services) as (_, sampler, rewards, teachers, _),
        ):
            groups = await draw(asked, run, sampler)
            await asyncio.gather(*map(rewards.judge, groups))
            accuracy = float(np.mean([attempt.verdict or 0.0 for group in groups for attempt in group]))
            kept = [group for group in groups if mixed(group)]
            if len(kept) < 2:
                raise SystemExit(
                    f"peer_signal: only {len(kept)} problems have two right and two wrong attempts; set "
                    "a larger --prompts"
                )
            teacher, step_context = teachers.opened["main"][1], run.step_context()
            views = {
                name: [context(group, step_context) for group in kept] for name, context in CONTEXTS.items()
            } | {FOREIGN: foreign(kept)}
            table = {
                name: measured(kept, some, await scores(teacher, kept, some, run.requirements))
                for name, some in views.items()
            }
    distinct = float(np.mean([len({spoken(a).text for a in group}) / len(group) for group in groups]))
    return {
        **provenance(asked, config_hash(cfg)),
        "student_accuracy": accuracy,
        "distinct_answers": distinct,
        "problems": len(groups),
        "problems_kept": len(kept),
        "contexts": {name: summed(rows, table["plain"], asked.seed) for name, rows in table.items()},
    }


def measured(
    groups: Sequence[Group], views: list[list[TeacherPrompt | None]], score: list[np.ndarray]
) -> list[dict[str, float]]:
    rows = []
    for group, some, score_G in zip(groups, views, score, strict=True):
        right_G = np.array([(attempt.verdict or 0.0) >= 0.5 for attempt in group])
        twin_G = np.array([view.notes.get("twin_fraction", 0.0) if view else 0.0 for view in some])
        rows.append(measure(score_G, right_G, twin_G))
    return rows


def provenance(asked: Asked, config: str) -> dict[str, Any]:
    """The facts that are needed to repeat the study, without paths or names of this machine."""
    words = {
        "--reader": asked.reader,
        "--student": asked.student,
        "--prompts": asked.prompts,
        "--group": asked.group,
        "--seed": asked.seed,
    }
    command = [
        "python",
        "studies/peer_signal.py",
        "--out",
        asked.out.name,
        *(str(w) for pair in words.items() for w in pair),
    ]
    return {
        "study": "peer_signal",
        "command": shlex.join(command),
        "config_hash": config,
        "threads": asked.threads,
        "commit": commit(),
    }


def markdown(found: dict[str, Any]) -> str:
    def cell(entry: dict[str, Any], signed: bool = False) -> str:
        if entry["mean"] is None:
            return "-"
        plus = "+" if signed else ""
        return f"{entry['mean']:{plus}.3f} ({entry['low']:{plus}.3f} to {entry['high']:{plus}.3f})"

    rows = [["context", "auc", "minus plain", "auc, no twin", "problems", "rank", "top", "twins"]]
    for name, row in found["contexts"].items():
        twins = f"{100 * row['twins']['mean']:.0f} %"
        cells = [
            cell(row["auc"]),
            cell(row["auc_minus_plain"], True),
            cell(row["auc_no_twin"]),
            str(row["auc_no_twin"]["problems"]),
        ]
        rows.append([name, *cells, cell(row["rank"]), cell(row["top"]), twins])
    note = (
        f"{found['problems_kept']} of {found['problems']} problems have at least two right and two wrong "
        "attempts; the student solves "
        f"{100 * found['student_accuracy']:.1f} %, {100 * found['distinct_answers']:.0f} % of a group's "
        "answers are different texts. "
        f"`problems` are those that still have both kinds without twins."
    )
    made = f"Command: `{found['command']}`  \nCommit {found['commit']}"
    return f"# peer_signal\n\n{grid(rows)}\n\n{note}\n\n{made}\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--reader", default="reflux:reader", help="the frozen model whose prompt shows attempts"
    )
    parser.add_argument("--student", default="reflux:reader", help="the model that samples the attempts")
    for name, default in (("prompts", 400), ("group", 8), ("seed", 0), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = Asked(**vars(parser.parse_args(arguments)))
    found = asyncio.run(signal(asked))
    asked.out.mkdir(parents=True, exist_ok=True)
    write_text(asked.out / "peer_signal.json", json.dumps(found, indent=2) + "\n")
    write_text(asked.out / "peer_signal.md", markdown(found))
    print(json.dumps(found, indent=2))
    print(markdown(found))
    return found


if __name__ == "__main__":
    main()
