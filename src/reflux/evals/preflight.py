"""The preflight: short measurements on the opened parts, before the first step of a run and after its first
update.

It uses random numbers of its own (the purpose "preflight") and changes no weights, so a run is the same with
and without it (law 8). `reflux doctor` makes the same measurements on more prompts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from reflux.config.recipe import RunConfig
from reflux.errors import ModelError, RefluxError
from reflux.evals import flow_findings, text_findings
from reflux.evals.evaluation import Evaluation
from reflux.evals.finding import Finding
from reflux.learners.base import OpenLearner
from reflux.models.parameters import parameter_count
from reflux.models.text import first_line
from reflux.teachers.base import Teacher
from reflux.teachers.collection import Teachers
from reflux.types import FlowRollout, Group, TokenRollout

# the most positions of a sampled answer
_POSITIONS = 24
# The shortest and the longest of the first prompts are taken, so that lengths differ.
_LOOKED_AT = 8
_CAUSES = (
    "Either this library does not support the architecture (docs/what_runs.md), or an adapter "
    "(learner.lora.targets) is on a module that takes none, or the learner's attention setting does not fit."
)
_MEMORY = (
    "student, sampler and teachers of this recipe do not fit into the memory of the device together. "
    "sampler.dtype = 'bfloat16', teachers.NAME.offload = true and learner.lora need less."
)
_REMEDY = "`reflux doctor` measures the same; skip_checks = ['{check}'] leaves this check out."


@dataclass
class Preflight:
    """The measurements of one run. asked: the sampler with the learner's weights, and the limits. folder: the
    run directory, or the folder that it will be in.
    """

    cfg: RunConfig
    asked: Evaluation
    learner: OpenLearner
    teachers: Teachers
    folder: Path
    # the sampled attempts of the last measurement
    groups: list[Group] = field(default_factory=list)
    # the learner's versions that were measured: before the first step, and after the first update
    versions: list[int] = field(default_factory=list)

    async def __call__(self) -> None:
        """Measure everything at the first call, and parity once more when the learner's version has changed.
        The user gets one line, and one for each warning. ModelError if a check has failed.
        """
        done = len(self.versions) == 2 or self.learner.version in self.versions
        if done or "all" in self.cfg.skip_checks:
            return
        started, updated = time.perf_counter(), bool(self.versions)
        self.versions.append(self.learner.version)
        found: list[Finding] = []
        try:
            async for finding in self.parity() if updated else self.findings():
                found.append(_passed(finding, updated))
        except Exception as error:
            kind = type(error).__name__
            if kind == "OutOfMemoryError":
                raise ModelError(f"{_MEMORY} torch says: {first_line(error)}") from error
            if isinstance(error, RefluxError) or not _raised_in(error, "transformers"):
                raise
            raise ModelError(
                f"the model's own code fails on short prompts ({kind}: {first_line(error)}). {_CAUSES}"
            ) from error
        listener, seconds = self.asked.services.listener, time.perf_counter() - started
        if not updated:
            checks = ", ".join(dict.fromkeys(finding.check for finding in found))
            listener.noted(f"preflight: {checks} measured in {seconds:.1f} s")
        for finding in found:
            if finding.verdict == "warning":
                listener.noted(f"preflight: {finding.check}: {finding.text}")

    async def findings(self, prompts: int = 2, n: int = 2) -> AsyncIterator[Finding]:
        """All findings, on `prompts` prompts with `n` answers each, except those of skipped checks."""
        skipped = self.cfg.skip_checks
        if "disk" not in skipped:
            yield self._disk()
        async for finding in self.parity(prompts, n):
            yield finding
        if not any(attempt.rollout.length for group in self.groups for attempt in group):
            return
        if "teacher" not in skipped:
            async for finding in self._teachers():
                yield finding
        if "gradient" not in skipped:
            for finding in self._about.gradient(self.learner, self.groups):
                yield finding
        for finding in self._about.templates(self.learner, self.asked.context, self.teachers, self.groups):
            yield finding
        if "identity" not in skipped:
            # no table of the recipe has this name
            context = replace(self.asked.context, name="(preflight)")
            yield await self._about.at_identity(context, self.asked.services, self.learner, self.groups)

    async def parity(self, prompts: int = 2, n: int = 2) -> AsyncIterator[Finding]:
        """Sample, and compare sampler and learner."""
        self.groups = await self._attempts(prompts, n)
        for finding in self._about.acted(self.learner, self.groups, self.asked.part.precision):
            if finding.check not in self.cfg.skip_checks:
                yield finding

    async def _attempts(self, prompts: int, n: int) -> list[Group]:
        """Attempts of the student. The texts are sampled once more with a stop text, so that one row ends
        earlier than the others.
        """
        first = islice(self.asked.task.prompts("train", self.asked.seed, 0), max(prompts, _LOOKED_AT))
        ordered = sorted(first, key=lambda prompt: len(str(prompt.messages)))
        chosen = [*ordered[: prompts // 2], *ordered[len(ordered) - (prompts - prompts // 2) :]]
        limit = min(_POSITIONS, self.asked.context.numbers.training_positions)
        draw = replace(self.asked.part.draw(0), purpose="preflight", max_positions=limit)
        groups = await self.asked.groups(chosen, n, draw)
        stop = self._about.early_stop(groups)
        if stop is None:
            return groups
        return groups + await self.asked.groups(chosen, n, replace(draw, stop=(stop,)))

    async def _teachers(self) -> AsyncIterator[Finding]:
        heads = self.asked.services.heads
        for table, (teacher, opened) in self.teachers.opened.items():
            if teacher.in_process:
                groups = [group for group in self.groups if _read_by(teacher, opened, group)]
                if groups:
                    yield await self._about.alone_and_together(table, opened, groups, heads)

    @property
    def _about(self) -> ModuleType:
        return flow_findings if self.cfg.learner.rollouts is FlowRollout else text_findings

    def _disk(self) -> Finding:
        full = self.cfg.learner.trains_all
        # a resumed run has written some of them
        written = sum(1 for _ in (self.folder / "checkpoints").glob("step-*"))
        parameters = parameter_count(self.learner.model.net)
        checkpoints = max(1, self.cfg.keep_checkpoints + 1 - written)
        # float32 weights and two moments in each checkpoint; the export is written beside the last one
        need = parameters * ((12 * checkpoints if full else 0) + 8)
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        needed = f"about {need / 1e9:.2g} GB needed for {checkpoints} checkpoints and the student"
        text = f"{free / 1e9:.1f} GB free in this folder, {needed}"
        return Finding("ok" if free > 1.2 * need else "failed", "disk", text)


def _passed(finding: Finding, updated: bool) -> Finding:
    """The finding. ModelError if its check has failed. updated: measured after the first update."""
    if finding.verdict != "failed":
        return finding
    when = "after the first update" if updated else "before the first step"
    remedy = _REMEDY.format(check=finding.check)
    raise ModelError(f"{finding.check}, measured {when}: {finding.text.rstrip('.')}. {remedy}")


def _read_by(teacher: Teacher, opened: Any, group: Group) -> bool:
    """False for a group that a teacher with routes is never asked about, and that is longer than its context
    window.
    """
    if not teacher.routes or group[0].rollout.prompt.route in teacher.routes:
        return True
    rollouts = (attempt.rollout for attempt in group)
    return all(
        len(rollout.prompt_tokens) + rollout.length <= opened.model.context_tokens
        for rollout in rollouts
        if isinstance(rollout, TokenRollout)
    )


def _raised_in(error: Exception, package: str) -> bool:
    """True if the code of `package`, or code that it loaded from the files of a model, was running when the
    error was raised.
    """
    names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(name.partition(".")[0] in (package, f"{package}_modules") for name in names)
