"""Runs a study: every arm on every seed, each in a separate process, then the table.

    python studies/run.py studies/vopd.toml --out runs/vopd [--arms a,b] [--seeds 0,1] [--jobs 1]
                          [--threads 2] [--set key.path=value]
    python studies/run.py studies/vopd.toml --out runs/vopd --variance [--draws 64]
                          [--students start,sampled@100]

If it is killed and started again, it continues: a run with a summary is finished, any other run resumes from
its checkpoint, and the table counts finished runs only. Runs with other settings are refused and never mixed
in. Written to OUT: ARM/seed-N (run directories), table.md and table.json; with --variance instead variance.md
and variance.json. With more than one job, or other work on the machine, the seconds are not reliable.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from arms import Study, Variance, load_study
from table import Measures, compare, markdown, measures, plain

from reflux.config.overrides import split_override, unpack
from reflux.config.recipe import RunConfig, differences, from_table, to_table, to_toml
from reflux.errors import ConfigError, RefluxError, RunError
from reflux.storage.files import write_text
from reflux.storage.recipe_paths import absolute
from reflux.storage.summary import commit

VARIANCE_HELP = (
    "draw whole gradients instead of running the arms. It costs a batch of attempts and a gradient per arm "
    "for each draw and student, and holds draws x arms gradients of the whole model in memory"
)
STUDENTS_HELP = (
    "for --variance: `start`, or ARM@STEP for a checkpoint of that arm's run on the first seed, separated by "
    "commas; replaces the study's list. "
    "Those of studies/vopd.toml need a run of its arm `sampled` in OUT; `start` needs no run"
)
# Not the command `reflux run`, which would write a report for each run.
RUN = "import sys, reflux; reflux.run(sys.argv[1], out=sys.argv[2], resume=len(sys.argv) > 3)"
NOTE = (
    "95 % t-intervals over seeds; the held-out problems are the same in every run. Differences are paired by "
    "seed. Peak memory is the whole process's, evaluations included."
)


@dataclass(frozen=True)
class Task:
    """One arm on one seed, and the folder of its run."""

    study: Study
    arm: str
    seed: int
    out: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.out / self.arm / f"seed-{self.seed}"

    @property
    def start_from(self) -> Task | None:
        """The run whose student this run starts from."""
        arm = self.study.starts.get(self.arm)
        return None if arm is None else replace(self, arm=arm)

    @cached_property
    def config(self) -> RunConfig:
        begin = [f"learner.model={self.start_from.folder}"] if self.start_from else []
        return self.study.config(self.arm, [*self.overrides, *begin, f"seed={self.seed}"])

    @property
    def ready(self) -> bool:
        return self.start_from is None or self.start_from.finished

    @property
    def finished(self) -> bool:
        """True if there is a summary of all steps. Raises RunError if the run has other settings."""
        path, steps = self.folder / "summary.json", self.config.steps
        if not path.exists() or json.loads(path.read_text())["steps"] < steps:
            return False
        made = to_table(from_table(tomllib.loads((self.folder / "config.toml").read_text())))
        # A run writes the paths of its recipe as absolute ones.
        changed = differences(made, absolute(self.config))
        if changed:
            raise RunError(
                f"{self.folder} was made with other settings; choose another --out, or use its settings:\n  "
                + "\n  ".join(changed)
            )
        return True

    def start(self) -> subprocess.Popen[bytes]:
        recipe = self.folder.with_suffix(".toml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, to_toml(self.config))
        resume = ["resume"] if (self.folder / "config.toml").exists() else []
        command = [sys.executable, "-c", RUN, str(recipe), str(self.folder), *resume]
        with self.folder.with_suffix(".log").open("ab") as log:
            # The run has a separate process group, so that a signal to this process reaches the run only
            # once, through this process.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )


def run_all(tasks: Sequence[Task], jobs: int) -> list[Task]:
    """Run the unfinished tasks, `jobs` at a time, and return the failed ones. If it is stopped, each run
    finishes its step and saves.
    """
    waiting = [task for task in tasks if not task.finished]
    running: dict[subprocess.Popen[bytes], Task] = {}
    failed: list[Task] = []
    started, total, done = time.monotonic(), len(waiting), 0
    try:
        while waiting or running:
            ready = [task for task in waiting if task.ready] if len(running) < jobs else []
            if not running and not ready:
                # the students that the remaining tasks start from do not exist, and no task makes them
                break
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[task.start()] = task
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                task, done = running.pop(process), done + 1
                failed += [] if process.returncode == 0 and task.finished else [task]
                left = (time.monotonic() - started) / done * (total - done) / 60
                print(
                    f"[{done}/{total}] {task.arm} seed {task.seed}: {outcome(task, failed)}; about "
                    f"{left:.0f} min left",
                    flush=True,
                )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed + waiting


def outcome(task: Task, failed: list[Task]) -> str:
    if task in failed:
        return f"failed, see {task.folder.with_suffix('.log')}"
    summary = json.loads((task.folder / "summary.json").read_text())
    scores = [summary[key]["accuracy"] for key in ("accuracy_before", "accuracy_after") if summary[key]]
    return " -> ".join(f"{100 * score:.1f} %" for score in scores) + f" in {summary['seconds']:.0f} s"


def found(study: Study, out: Path, overrides: tuple[str, ...]) -> Iterator[Task]:
    """Every finished run of the study in `out`, with the arms in the order of the study's file."""
    for arm in study.arms:
        seeds = sorted(
            int(path.name.removeprefix("seed-")) for path in (out / arm).glob("seed-*") if path.is_dir()
        )
        yield from (
            task for task in (Task(study, arm, seed, out, overrides) for seed in seeds) if task.finished
        )


def provenance(study: Study, asked: argparse.Namespace) -> dict[str, Any]:
    """The facts that are needed to repeat the study, without paths or names of this machine."""
    return {
        "study": study.name,
        "command": shown_command(asked),
        "study_hash": study.hash(overrides_of(asked)),
        "threads": asked.threads,
        "jobs": asked.jobs,
        "table_made_at_commit": commit(),
    }


def write_table(study: Study, asked: argparse.Namespace) -> str:
    runs: dict[str, dict[int, Measures]] = {}
    listed = []
    for task in found(study, asked.out, overrides_of(asked)):
        runs.setdefault(task.arm, {})[task.seed] = measures(task.folder)
        summary = json.loads((task.folder / "summary.json").read_text())
        listed.append(
            {
                "arm": task.arm,
                "seed": task.seed,
                **{key: summary[key] for key in ("commit", "config_hash", "steps")},
            }
        )
    born = provenance(study, asked)
    compared = compare(runs, study.baseline)
    commits = ", ".join(sorted({str(row["commit"]) for row in listed})) or "none"
    text = (
        f"# {study.name}\n\n{markdown(compared, study.baseline)}\n{NOTE}\n\nCommand: `{born['command']}`  \n"
        + (
            f"Commit of the runs: {commits}; study {born['study_hash']}; threads {born['threads']}, jobs "
            f"{born['jobs']}; seeds "
            + "; ".join(f"{arm} {', '.join(map(str, row['seeds']))}" for arm, row in compared.items())
            + "\n"
        )
    )
    each = [{**row, "measures": runs[row["arm"]][row["seed"]]} for row in listed]
    write_text(
        asked.out / "table.json", json.dumps({**born, "arms": plain(compared), "runs": each}, indent=2) + "\n"
    )
    write_text(asked.out / "table.md", text)
    return text


def overrides_of(asked: argparse.Namespace) -> tuple[str, ...]:
    return (f"threads={asked.threads}", *asked.set)


def shown_command(asked: argparse.Namespace) -> str:
    """The command without paths of this machine: an absolute path is cut to its last part."""

    def shown(path: Path | str) -> str:
        return Path(path).name if Path(path).is_absolute() else str(path)

    options = {
        "--arms": asked.arms,
        "--seeds": asked.seeds,
        "--students": asked.students,
        "--draws": asked.draws,
    }
    words = ["python", "studies/run.py", shown(asked.study), "--out", shown(asked.out)]
    words += [word for option, value in options.items() if value for word in (option, str(value))]
    words += ["--jobs", str(asked.jobs), "--threads", str(asked.threads)]
    changes = [(path, unpack(value)) for path, value in map(split_override, asked.set)]
    words += [
        word
        for path, value in changes
        for word in ("--set", f"{path}={shown(value) if isinstance(value, str) else value}")
    ]
    words += ["--variance"] if asked.variance else []
    return shlex.join(words)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="the study's file, such as studies/vopd.toml")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder of the runs and tables; created if it does not exist",
    )
    parser.add_argument(
        "--arms", default="", help="some of the study's arms, separated by commas; else the study's default"
    )
    parser.add_argument(
        "--seeds", default="", help="whole numbers separated by commas; replaces the study's list"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of parallel runs (1); seconds are reliable with 1 only"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each run (2)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key.path=value",
        help="change the recipe of every arm; may be repeated",
    )
    parser.add_argument("--variance", action="store_true", help=VARIANCE_HELP)
    parser.add_argument(
        "--draws",
        type=int,
        default=0,
        help="for --variance: batches at each student, 3 or more; replaces the study's number",
    )
    parser.add_argument("--students", default="", help=STUDENTS_HELP)
    asked = parser.parse_args(arguments)
    if asked.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return asked


def run_study(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    study = load_study(asked.study)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.variance:
        print(draw_variance(study, asked))
        return
    arms = named(asked.arms) or study.default or tuple(study.arms)
    failed = run_all(
        [
            Task(study, arm, seed, asked.out, overrides_of(asked))
            for seed in seeds_of(study, asked)
            for arm in arms
        ],
        asked.jobs,
    )
    print(write_table(study, asked))
    if failed:
        raise RunError(
            "failed: "
            + ", ".join(f"{task.arm} seed {task.seed}" for task in failed)
            + ". See their .log files for the reason."
        )


def draw_variance(study: Study, asked: argparse.Namespace) -> str:
    from gradient_variance import Drawing, write_variance

    variance = study.variance or Variance()
    arms = named(asked.arms) or variance.arms or tuple(study.arms)
    drawing = Drawing(
        arms,
        named(asked.students) or variance.students,
        asked.draws or variance.draws,
        seeds_of(study, asked)[0],
    )
    return write_variance(study, drawing, asked.out, overrides_of(asked), provenance(study, asked))


def named(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def seeds_of(study: Study, asked: argparse.Namespace) -> tuple[int, ...]:
    unknown = [seed for seed in named(asked.seeds) if not seed.strip().isdecimal()]
    if unknown:
        raise ConfigError(
            "--seeds takes whole numbers separated by commas, such as 0,1; got "
            f"{', '.join(map(repr, unknown))}"
        )
    return tuple(map(int, named(asked.seeds))) or study.seeds


if __name__ == "__main__":
    import signal

    # SIGTERM raises SystemExit here, so that running processes are stopped and save
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_study()
    except RefluxError as error:
        sys.exit(f"studies/run.py: {error}")
