"""A run: its counters, what is due, evaluations, checkpoints, resume. `loop.train` drives it.

config.toml  metrics.jsonl  evals.jsonl  attempts.jsonl  checkpoints/step-N/  student/  summary.json
report.html; of some parts searches.jsonl  parts/NAME/
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
from reflux.config.recipe import RunConfig, part_context, to_table, to_toml
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.errors import RunError, Stopped
from reflux.evals.base import Source, is_due
from reflux.evals.evaluation import Evaluation
from reflux.loss.step import StepResult
from reflux.metrics.flops import TOKENS, Landed, Ran, Work, add_up
from reflux.metrics.step_metrics import step_metrics
from reflux.metrics.trackers import NoTracker, Tracker, open_tracker
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
    """Where a run lives and who watches it; nothing here changes what it computes."""

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
        # the training prompts from here on
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
        self._started = time.perf_counter()
        # until the lock is held
        self._tracker: Tracker = NoTracker()
        # by the step (from 0) that attempts are meant for
        self.landed: dict[int, Landed] = {}
        self._lock = (self.dir / ".lock").open("w")

    @classmethod
    def open(cls, cfg: RunConfig, requirements: Requirements, options: Options) -> Run:
        """Make the directory, or take up the one of this very recipe. Raises RunError where it belongs to
        another run.
        """
        saved = checkpoints.steps(options.out / "checkpoints")
        step = saved[-1] if options.resume and saved else 0
        if options.resume:
            run_dir.check_same(cfg, options.out)
        elif options.out.is_file():
            raise RunError(f"{options.out} is a file. Choose a folder with --out.")
        elif (options.out / "config.toml").exists():
            raise RunError(
                f"{options.out} holds a run already. Continue it with --resume, or choose another folder "
                "with --out."
            )
        # bad data is refused before anything is written
        prompts = cfg.task.prompts("train", cfg.seed, step * cfg.prompts_per_step)
        checks.inputs(cfg)
        options.out.mkdir(parents=True, exist_ok=True)
        run = cls(cfg, requirements, options, step, prompts)
        with ExitStack() as undo:
            undo.callback(run.close)
            run_dir.take_lock(run._lock, run.dir)
            # before config.toml: without its package there is no run
            run._tracker = open_tracker(cfg.track, run.dir, to_table(cfg))
            files.write_text(run.dir / "config.toml", to_toml(cfg))
            run_dir.cut_back(run.dir, step)
            undo.pop_all()
        return run

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        files.append_lines(self.dir / name, [dict(row)])

    # --- what parts ask for

    @property
    def steps_left(self) -> int:
        return max(0, self.cfg.steps - self.step)

    def step_context(self, step: int | None = None) -> StepContext:
        return StepContext(self.step if step is None else step, self.seed)

    def context(self, name: str) -> PartContext:
        """What the part `name` may know of this run."""
        return part_context(self.cfg, self.requirements, name, self.dir)

    # --- the loop's verbs

    def restore(self, learner: OpenLearner, teachers: Teachers, extrapolation: OpenExtrapolation) -> None:
        """Every part takes up its state; on a fresh run extrapolation takes the start weights instead."""
        if not self.step:
            extrapolation.start(learner.access)
            return
        kept = checkpoints.of_step(self.dir / "checkpoints", self.step)
        learner.load(kept / "learner")
        teachers.load(kept / "teachers")
        extrapolation.load(kept / "extrapolation")

    def write(self, group: Group, step: int) -> None:
        """An attempt is on disk before anything else can happen to it."""
        self.landed.setdefault(step, Landed()).add(group[0].rollout.prompt.id, Work.of(group))
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
        """The step is done: count it, write its metrics and the attempts' second lines."""
        discarded, on_policy = self.landed.pop(self.step, Landed()).discarded, self.cfg.sampler.on_policy
        updates = result.stats["updates"].value if "updates" in result.stats else 0
        # that consumed these attempts
        version = learner.version - int(updates or 0) - jumped
        ran = Ran(learner.macs, result.forward_positions, result.backward_positions)
        tables, macs, clock = teachers.tables, teachers.macs, self.services.clock
        metrics = step_metrics(
            result.stats, ran, groups, version, tables, macs, clock, discarded, scored, on_policy
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
                f"step {self.step}: no attempt has both a weight and a word to learn from, so the weights "
                "stay as they are"
            )

    def due(self, what: str) -> bool:
        """Is it time to "eval" or to "save"? The last step's are made by the end of the loop."""
        if what == "save" and self.stopping:
            return True
        every = self.cfg.eval_every if what == "eval" else self.cfg.save_every
        return self.step % every == 0 and self.step < self.cfg.steps

    @property
    def finished(self) -> bool:
        """Was there nothing left to do when the directory was opened? Then nothing is done."""
        return self.resumed is not None and self.resumed >= self.cfg.steps and self.evaluated

    def evaluation(self, sampler: OpenSampler, teachers: Teachers) -> Evaluation:
        """What evaluations may know of this run, and whom they may ask."""
        return Evaluation(
            self.context("sampler"), self.services, self.cfg.sampler, sampler, teachers, self.step
        )

    @property
    def evaluated(self) -> bool:
        """Is there nothing left to ask about the weights of now?"""
        return not self.cfg.evals or any(
            row["step"] == self.step for row in files.read_lines(self.dir / "evals.jsonl")
        )

    async def evaluate(
        self, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers, extrapolation: OpenExtrapolation
    ) -> None:
        """Ask every evaluation about the weights of now, unless it is done. Where one raises, what training
        has made is saved first.
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
        """The table of each evaluation; those that speak of the teacher are asked only once.

        Where an average is kept, that is what they see in the sampler and in the learner, for as long as they
        run.
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
                # also where an evaluation raised: the sampler goes on with the student's own weights
                await sampler.publish(learner.publish(), self.step)

    def save(self, learner: OpenLearner, teachers: Teachers, extrapolation: OpenExtrapolation) -> None:
        """Checkpoint every part, export the student."""
        parts: dict[str, checkpoints.Fill] = {
            "learner": learner.save,
            "teachers": teachers.save,
            "extrapolation": extrapolation.save,
            "run": lambda folder: checkpoints.write(folder, {**self.totals, "seconds": self.seconds}),
        }
        # first: no checkpoint has an older student
        files.write_folder(self.dir / "student", partial(self._export, learner))
        checkpoints.save(self.dir / "checkpoints", self.step, parts, self.cfg.keep_checkpoints)

    def stop_if_asked(self) -> None:
        """End the run, if someone asked for it and it is not at its end anyway. Everything is saved by then:
        `due` saw to it.
        """
        if self.stopping and self.step < self.cfg.steps:
            raise Stopped(f"stopped after step {self.step} of {self.cfg.steps}; everything is saved")

    def _export(self, learner: OpenLearner, folder: Path) -> None:
        learner.export(folder)
        (folder / "README.md").write_text(model_card(self.cfg, self.step, papers(self.cfg)), encoding="utf-8")

    def keep_failed_batch(self, groups: Sequence[Group], why: str) -> Path:
        """Write the batch of a refused step for inspection."""
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
        """What summary.json says. A run that did nothing new keeps the summary it had."""
        kept = saved_summary(self.dir) if self.finished else None
        return kept or summarise(self.dir, self.cfg, self.step, self.totals, self.seconds)
