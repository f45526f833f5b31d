"""A run: its counters, schedule, evaluations, checkpoints and resume. `loop.train` calls its methods.

Files of a run directory: config.toml  data.json  metrics.jsonl  evals.jsonl  attempts.jsonl
checkpoints/step-N/  in_flight/  student/  summary.json  report.html. Also trace.json if `trace` is
set, and some parts write searches.jsonl or parts/NAME/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux import checks
from reflux.config.citations import papers
from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig, part_context, to_table
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.errors import Stopped, StoppedByAlarm
from reflux.evals import at_step
from reflux.evals.evaluation import Evaluation
from reflux.loss.step import StepResult
from reflux.metrics.flops import TOKENS, Landed, Ran, add_up
from reflux.metrics.step_metrics import step_metrics
from reflux.metrics.trackers import open_tracker
from reflux.runtime.pipeline import Ask
from reflux.runtime.positions import Positions
from reflux.runtime.refreshes import Refreshes
from reflux.runtime.services import Services
from reflux.runtime.trace import Trace
from reflux.runtime.watch import Silent, Watch
from reflux.storage import attempt_log, checkpoints, failed_batch, files, run_dir
from reflux.storage.in_flight import InFlight
from reflux.storage.journal import Journal
from reflux.storage.model_card import model_card
from reflux.storage.summary import saved_summary, summarise
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.extrapolation.base import OpenExtrapolation
    from reflux.learners.base import OpenLearner
    from reflux.metrics.flops import Spent
    from reflux.rewards.opened_rewards import Rewards
    from reflux.samplers.base import OpenSampler
    from reflux.teachers.collection import Teachers


@dataclass(frozen=True)
class Options:
    """The run directory and the progress display. These options do not change what the run computes."""

    # the run directory
    out: Path
    resume: bool = False
    watch: Watch = Silent()


class Run:
    """One run on disk and its counters. `step` counts completed optimiser steps."""

    def __init__(
        self,
        cfg: RunConfig,
        requirements: Requirements,
        options: Options,
        positions: Positions,
        prompts: Iterator[Prompt],
    ):
        self.cfg, self.requirements, self.dir, self.watch = cfg, requirements, options.out, options.watch
        # the training prompts from block `positions.first` on, and which of them are consumed
        self.prompts, self.positions = prompts, positions
        self.seed, self.task, self.step = cfg.seed, cfg.task, (step := positions.consumed)
        self.resumed = step if options.resume else None
        self.stopping = False
        self.journal = Journal(self.dir, options.watch, cfg)
        overlap = cfg.max_staleness > 0 or cfg.sampler.overlaps
        self.services = Services(
            cfg.learner.student, overlap=overlap, listener=options.watch, append=self.journal.append
        )
        self.totals: dict[str, float] = dict.fromkeys((*TOKENS, "flops", "seconds"), 0)
        if step:
            self.totals |= checkpoints.read_plain(checkpoints.of_step(self.dir / "checkpoints", step) / "run")
        rules = [name for name, rule in cfg.credit.items() if rule.measures_freshness]
        self.refreshes = Refreshes(cfg.refresh if cfg.max_staleness else None, self.totals, rules)
        self._started = time.perf_counter()
        self.landed = Landed()
        # the parts whose state is in every checkpoint, by the name of their folder
        self.kept: dict[str, checkpoints.Kept] = {}
        self.in_flight = InFlight(self.dir, cfg.task.runs_once, max_staleness=cfg.max_staleness)
        self._lock = (self.dir / ".lock").open("w")

    @classmethod
    def open(cls, cfg: RunConfig, requirements: Requirements, options: Options) -> Run:
        """Make the run directory, or, to resume, open the run directory of the same recipe. Raises RunError
        if the directory already has a run and is not resumed, or if it belongs to another recipe.
        """
        run_dir.check_place(options.out)
        if options.resume:
            run_dir.check_same(cfg, options.out)
        else:
            run_dir.refuse_started(options.out)
        # Missing files and invalid data raise an error before anything is written. The folders of models
        # come first, because data may have to be downloaded.
        checks.inputs(cfg)
        positions = run_dir.positions(options.out) if options.resume else Positions.after(0)
        prompts = cfg.sampler.training_prompts(cfg, positions.first * cfg.prompts_per_step)
        run_dir.make(options.out)
        run = cls(cfg, requirements, options, positions, prompts)
        with ExitStack() as undo:
            undo.callback(run.close)
            if note := run_dir.take_lock(run._lock, run.dir):
                run.watch.noted(note)
            # before config.toml is written, because the tracker's package may be missing
            run.journal.tracker = open_tracker(cfg.track, run.dir, to_table(cfg))
            if cfg.trace:
                run.services.clock.trace = Trace(run.dir / "trace.json", run.dir.name)
            run_dir.write_recipe(cfg, run.dir)
            run_dir.cut_back(run.dir, run.step)
            run.journal.resumed(run.step)
            undo.pop_all()
        return run

    # --- values for the loop and the parts

    def step_context(self, step: int | None = None, version: int = 0) -> StepContext:
        return StepContext(self.step if step is None else step, self.seed, version, self.step)

    def context(self, name: str) -> PartContext:
        """The context of one part. name: the key of the part, such as "learner" or "evals.NAME"."""
        return part_context(self.cfg, self.requirements, name, self.dir)

    # --- actions of the loop

    def restore(
        self, learner: OpenLearner, rewards: Rewards, teachers: Teachers, extrapolation: OpenExtrapolation
    ) -> None:
        """Load the state of these parts, which `save` writes later, and find the attempts that were in
        flight. On a new run, extrapolation stores the start weights instead.
        """
        self.kept = {
            "learner": learner,
            "rewards": rewards,
            "teachers": teachers,
            "extrapolation": extrapolation,
        }
        if self.step:
            for name, part in self.kept.items():
                part.load(checkpoints.of_step(self.dir / "checkpoints", self.step) / name)
        else:
            extrapolation.start(learner.access)
        self.services.tell(self.in_flight.resume(self.positions, learner.version))

    def write(self, ask: Ask, group: Group) -> None:
        """Write the attempts to disk: the first line of each, and what a resume needs to use them again."""
        self.landed.add(group)
        self.in_flight.keep(ask, group)
        files.append_lines(self.dir / attempt_log.NAME, [attempt_log.arrived(attempt) for attempt in group])

    def advance(
        self,
        result: StepResult,
        groups: Sequence[Group],
        learner: OpenLearner,
        teachers: Teachers,
        jumped: bool,
        scored: Spent | None,
        positions: Positions,
    ) -> None:
        """Count a finished step, and write its metrics and the second line of each attempt. jumped: True if
        extrapolation replaced the weights. scored: the work of extrapolation's scores. positions: the prompts
        that are consumed now.
        """
        discarded, on_policy = self.landed.take(groups), self.cfg.sampler.on_policy
        self.in_flight.consume(groups)
        updates = result.stats["updates"].value if "updates" in result.stats else 0
        # of the policy that was trained on these attempts, before the step
        version = learner.version - int(updates or 0) - jumped
        ran = Ran(learner.macs, result.forward_positions, result.backward_positions)
        tables, macs = teachers.tables, teachers.macs
        metrics = step_metrics(
            result.stats, ran, groups, version, tables, macs, self.services, discarded, scored, on_policy
        )
        files.append_lines(
            self.dir / attempt_log.NAME,
            [attempt_log.learned(a, self.step) for group in groups for a in group],
        )
        self.step, self.positions = self.step + 1, positions
        add_up(self.totals, metrics)
        self.services.clock.step_ended(self.step)
        self.journal.stepped({"step": self.step, **metrics})

    def due(self, what: str) -> bool:
        """True if an evaluation ("eval") or a checkpoint ("save") is due now. A run that is asked to stop, or
        that an alarm ends, saves at once. After the last step the loop evaluates and saves in any case, so
        nothing is due then.
        """
        if what == "save" and (self.stopping or self.journal.monitor.ending):
            return True
        every = self.cfg.eval_every if what == "eval" else self.cfg.save_every
        return self.step % every == 0 and self.step < self.cfg.steps

    @property
    def finished(self) -> bool:
        """True if all steps and the last evaluation were done when the directory was opened."""
        return self.resumed is not None and self.resumed >= self.cfg.steps and self.evaluated

    def evaluation(self, sampler: OpenSampler, teachers: Teachers) -> Evaluation:
        """The values and parts of this run that evaluations use."""
        return Evaluation(
            self.context("sampler"), self.services, self.cfg.sampler, sampler, teachers, self.step
        )

    @property
    def evaluated(self) -> bool:
        """True if the current weights are evaluated, or if the recipe has no evaluation."""
        return not self.cfg.evals or any(
            row["step"] == self.step for row in files.read_lines(self.dir / "evals.jsonl")
        )

    async def evaluate(self, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers) -> None:
        """Run every evaluation that is due, unless the current weights are evaluated already. If one raises,
        a checkpoint is saved (not at step 0), and the error is raised again.
        """
        if self.evaluated:
            return
        seen = {name for row in files.read_lines(self.dir / "evals.jsonl") for name in row}
        asked = self.evaluation(sampler, teachers)
        try:
            with self.services.clock.span("loop", "evaluate", step=self.step):
                found = await at_step.results(
                    self.cfg.evals,
                    asked,
                    learner,
                    steps=self.cfg.steps,
                    seen=seen,
                    folder=lambda name: self.context(f"evals.{name}").folder,
                )
        except Exception:
            if self.step:
                self.save(learner)
            raise
        self.journal.evaluated({"step": self.step, **found})

    def save(self, learner: OpenLearner) -> None:
        """Export the student and write a checkpoint of the parts that `restore` got, and of counters."""
        parts: dict[str, checkpoints.Fill] = {
            **{name: part.save for name, part in self.kept.items()},
            "positions": lambda folder: checkpoints.write(folder, self.positions.state()),
            "run": lambda folder: checkpoints.write(folder, {**self.totals, "seconds": self.seconds}),
        }
        # The student is exported first, so it is never older than the newest checkpoint.
        with self.services.clock.span("loop", "checkpoint", step=self.step):
            files.write_folder(self.dir / "student", partial(self._export, learner))
            checkpoints.save(self.dir / "checkpoints", self.step, parts, self.cfg.keep_checkpoints)
        self.journal.saved(self.step)
        self.in_flight.forget()

    def stop_if_asked(self) -> None:
        """Raise Stopped if a signal asked the run to stop, StoppedByAlarm if an alarm of `stop_on` began, and
        this was not its last step. The state is already saved, because `due` is True for "save" then.
        """
        where = f"stopped after step {self.step} of {self.cfg.steps}; everything is saved"
        if self.step < self.cfg.steps and self.journal.monitor.ending:
            raise StoppedByAlarm(f"{where}. {self.journal.monitor.ending}")
        if self.stopping and self.step < self.cfg.steps:
            raise Stopped(where)

    def _export(self, learner: OpenLearner, folder: Path) -> None:
        learner.export(folder)
        (folder / "README.md").write_text(model_card(self.cfg, self.step, papers(self.cfg)), encoding="utf-8")

    def keep_failed_batch(self, groups: Sequence[Group], why: str) -> Path:
        """Write the groups of a failed step, and the reason `why`, to a file, and return the path of it."""
        return failed_batch.keep(
            self.dir / f"{failed_batch.NAME}{self.step + 1}.jsonl", groups, self.step, why
        )

    @property
    def seconds(self) -> float:
        return self.totals["seconds"] + time.perf_counter() - self._started

    def close(self) -> None:
        self.services.close()
        self.journal.close()
        self._lock.close()

    def summary(self) -> dict[str, Any]:
        """The content of summary.json. A finished run that did nothing new keeps its old summary."""
        kept = saved_summary(self.dir) if self.finished else None
        return kept or summarise(self.dir, self.cfg, self.step, self.totals, self.seconds)
