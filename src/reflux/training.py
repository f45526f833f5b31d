"""A run: its counters, schedule, evaluations, checkpoints and resume. `loop.train` calls its methods.

Files of a run directory: config.toml  data.json  metrics.jsonl  evals.jsonl  attempts.jsonl
checkpoints/step-N/  student/  summary.json  report.html. Some parts also write searches.jsonl or parts/NAME/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
from reflux.errors import Stopped
from reflux.evals.base import Source, is_due
from reflux.evals.evaluation import Evaluation
from reflux.loss.step import StepResult
from reflux.metrics.flops import TOKENS, Landed, Ran, Work, add_up
from reflux.metrics.step_metrics import step_metrics
from reflux.metrics.trackers import NoTracker, Tracker, open_tracker
from reflux.runtime.refreshes import Refreshes
from reflux.runtime.services import Services
from reflux.runtime.watch import Silent, Watch
from reflux.storage import attempt_log, checkpoints, failed_batch, files, run_dir
from reflux.storage.model_card import model_card
from reflux.storage.summary import saved_summary, summarise
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.extrapolation.base import OpenExtrapolation
    from reflux.learners.base import OpenLearner
    from reflux.metrics.flops import Spent
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
        step: int,
        prompts: Iterator[Prompt],
    ):
        self.cfg, self.requirements, self.dir, self.watch = cfg, requirements, options.out, options.watch
        # the training prompts from step `step` on
        self.prompts = prompts
        self.seed, self.task, self.step = cfg.seed, cfg.task, step
        self.resumed = step if options.resume else None
        self.stopping = False
        overlap = cfg.max_staleness > 0 or cfg.sampler.overlaps
        self.services = Services(
            cfg.learner.student, overlap=overlap, listener=options.watch, append=self._append
        )
        self.totals: dict[str, float] = dict.fromkeys((*TOKENS, "flops", "seconds"), 0)
        if step:
            self.totals |= checkpoints.read_plain(checkpoints.of_step(self.dir / "checkpoints", step) / "run")
        rules = [name for name, rule in cfg.credit.items() if rule.measures_freshness]
        self.refreshes = Refreshes(cfg.refresh if cfg.max_staleness else None, self.totals, rules)
        self._started = time.perf_counter()
        # `open` replaces it once the lock is held
        self._tracker: Tracker = NoTracker()
        # by the optimiser step (from 0) that the attempts were sampled for
        self.landed: dict[int, Landed] = {}
        self._lock = (self.dir / ".lock").open("w")

    @classmethod
    def open(cls, cfg: RunConfig, requirements: Requirements, options: Options) -> Run:
        """Make the run directory, or, to resume, open the run directory of the same recipe. Raises RunError
        if the directory already has a run and is not resumed, or if it belongs to another recipe.
        """
        run_dir.check_place(options.out)
        saved = checkpoints.steps(options.out / "checkpoints")
        step = saved[-1] if options.resume and saved else 0
        if options.resume:
            run_dir.check_same(cfg, options.out)
        else:
            run_dir.refuse_started(options.out)
        # Missing files and invalid data raise an error before anything is written. The folders of models
        # come first, because data may have to be downloaded.
        checks.inputs(cfg)
        prompts = cfg.task.prompts("train", cfg.seed, step * cfg.prompts_per_step)
        run_dir.make(options.out)
        run = cls(cfg, requirements, options, step, prompts)
        with ExitStack() as undo:
            undo.callback(run.close)
            if note := run_dir.take_lock(run._lock, run.dir):
                run.watch.noted(note)
            # before config.toml is written, because the tracker's package may be missing
            run._tracker = open_tracker(cfg.track, run.dir, to_table(cfg))
            run_dir.write_recipe(cfg, run.dir)
            run_dir.cut_back(run.dir, step)
            undo.pop_all()
        return run

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        files.append_lines(self.dir / name, [dict(row)])

    # --- values for the loop and the parts

    @property
    def steps_left(self) -> int:
        return max(0, self.cfg.steps - self.step)

    def step_context(self, step: int | None = None, version: int = 0) -> StepContext:
        return StepContext(self.step if step is None else step, self.seed, version)

    def context(self, name: str) -> PartContext:
        """The context of one part. name: the key of the part, such as "learner" or "evals.NAME"."""
        return part_context(self.cfg, self.requirements, name, self.dir)

    # --- actions of the loop

    def restore(self, learner: OpenLearner, teachers: Teachers, extrapolation: OpenExtrapolation) -> None:
        """Load the state of these parts. On a new run, extrapolation stores the start weights instead."""
        if not self.step:
            extrapolation.start(learner.access)
            return
        kept = checkpoints.of_step(self.dir / "checkpoints", self.step)
        learner.load(kept / "learner")
        teachers.load(kept / "teachers")
        extrapolation.load(kept / "extrapolation")

    def write(self, group: Group, step: int) -> None:
        """Write the first line of each attempt to disk. step: the step that the group was sampled for."""
        self.landed.setdefault(step, Landed()).add(group[0].rollout.prompt.key, Work.of(group))
        files.append_lines(
            self.dir / "attempts.jsonl", [attempt_log.arrived(attempt, step) for attempt in group]
        )

    def advance(
        self,
        result: StepResult,
        groups: Sequence[Group],
        learner: OpenLearner,
        teachers: Teachers,
        jumped: bool,
        scored: Spent | None,
    ) -> None:
        """Count a finished step, and write its metrics and the second line of each attempt. jumped: True if
        extrapolation replaced the weights. scored: the work of extrapolation's scores.
        """
        discarded, on_policy = self.landed.pop(self.step, Landed()).discarded, self.cfg.sampler.on_policy
        updates = result.stats["updates"].value if "updates" in result.stats else 0
        # of the policy that was trained on these attempts, before the step
        version = learner.version - int(updates or 0) - jumped
        ran = Ran(learner.macs, result.forward_positions, result.backward_positions)
        tables, macs = teachers.tables, teachers.macs
        metrics = step_metrics(
            result.stats, ran, groups, version, tables, macs, self.services, discarded, scored, on_policy
        )
        files.append_lines(
            self.dir / "attempts.jsonl",
            [attempt_log.learned(a, self.step) for group in groups for a in group],
        )
        self.step += 1
        add_up(self.totals, metrics)
        metrics = {"step": self.step, **metrics}
        files.append_lines(self.dir / "metrics.jsonl", [metrics])
        self._tracker.log(metrics, self.step)
        self.watch.stepped(metrics)
        if not metrics["tokens_trained"]:
            self.watch.noted(
                f"step {self.step}: no attempt has both a weight above 0 and a target or an advantage "
                "offset, so the weights did not change"
            )

    def due(self, what: str) -> bool:
        """True if an evaluation ("eval") or a checkpoint ("save") is due now. A run that is asked to stop
        saves at once. After the last step the loop evaluates and saves in any case, so nothing is due then.
        """
        if what == "save" and self.stopping:
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

    async def evaluate(
        self, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers, extrapolation: OpenExtrapolation
    ) -> None:
        """Run every evaluation that is due, unless the current weights are evaluated already. If one raises,
        a checkpoint is saved (not at step 0), and the error is raised again.
        """
        if self.evaluated:
            return
        try:
            results = {"step": self.step, **await self._results(learner, sampler, teachers)}
        except Exception:
            if self.step:
                self.save(learner, teachers, extrapolation)
            raise
        files.append_lines(self.dir / "evals.jsonl", [results])
        self._tracker.log({key: value for key, value in results.items() if key != "step"}, self.step)
        self.watch.evaluated(results)

    async def _results(
        self, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers
    ) -> dict[str, Any]:
        """The result of each evaluation that is due. Evaluations of the teacher run only once.

        If the learner keeps averaged weights, the sampler and the learner use them during the evaluations.
        """
        seen = {name for row in files.read_lines(self.dir / "evals.jsonl") for name in row}
        averaged = False
        try:
            with learner.at_mean() as averaged:
                if averaged:
                    await sampler.publish(self.services.lend(learner.publish()), self.step)
                asked = self.evaluation(sampler, teachers)
                return {
                    name: await part(asked, Source(learner.access, self.context(f"evals.{name}").folder))
                    for name, part in self.cfg.evals.items()
                    if is_due(part, self.step, self.cfg.steps, name in seen)
                }
        finally:
            if averaged:
                # The sampler gets the student's own weights back, also if an evaluation raised.
                await sampler.publish(learner.publish(), self.step)

    def save(self, learner: OpenLearner, teachers: Teachers, extrapolation: OpenExtrapolation) -> None:
        """Export the student and write a checkpoint of learner, teachers, extrapolation and counters."""
        parts: dict[str, checkpoints.Fill] = {
            "learner": learner.save,
            "teachers": teachers.save,
            "extrapolation": extrapolation.save,
            "run": lambda folder: checkpoints.write(folder, {**self.totals, "seconds": self.seconds}),
        }
        # The student is exported first, so it is never older than the newest checkpoint.
        files.write_folder(self.dir / "student", partial(self._export, learner))
        checkpoints.save(self.dir / "checkpoints", self.step, parts, self.cfg.keep_checkpoints)

    def stop_if_asked(self) -> None:
        """Raise Stopped if a signal asked the run to stop and this was not its last step. The state is
        already saved, because `due` is True for "save" then.
        """
        if self.stopping and self.step < self.cfg.steps:
            raise Stopped(f"stopped after step {self.step} of {self.cfg.steps}; everything is saved")

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
        self._tracker.close()
        self._lock.close()

    def summary(self) -> dict[str, Any]:
        """The content of summary.json. A finished run that did nothing new keeps its old summary."""
        kept = saved_summary(self.dir) if self.finished else None
        return kept or summarise(self.dir, self.cfg, self.step, self.totals, self.seconds)
