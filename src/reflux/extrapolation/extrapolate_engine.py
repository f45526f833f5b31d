"""The searches of `extrapolation.extrapolate`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reflux.errors import ConfigError, RefluxError, RunError
from reflux.extrapolation import extrapolate
from reflux.learners.access import WeightAccess, moved, required
from reflux.storage import checkpoints

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.extrapolation.base import Score
    from reflux.extrapolation.extrapolate import Extrapolate
    from reflux.metrics.flops import Spent
    from reflux.runtime.services import Services

# Tensors by the model's own parameter names.
Weights = dict[str, Tensor]
ANCHOR = "anchor/"


@dataclass(frozen=True)
class Trial:
    """A candidate, its score, and the score that it had to exceed under the same random numbers."""

    multiple: int
    score: float
    against: float


class OpenExtrapolate:
    """The open extrapolation. It holds the anchor, the weights at the end of the previous search: float32
    copies, on the CPU, of the weights that move.
    """

    def __init__(self, cfg: Extrapolate, context: PartContext, services: Services):
        self.cfg, self.context, self.services = cfg, context, services
        self._anchor: Weights = {}

    def start(self, access: WeightAccess | None) -> None:
        """Store the start weights as the anchor. ConfigError if `include` matches no parameter. ModelError if
        the learner keeps no float32 weights.
        """
        access = required(access, "extrapolation")
        names = moved(access.names, self.cfg.include)
        if not names:
            raise ConfigError(
                f"extrapolation.include = {list(self.cfg.include)} matches no parameter of "
                f"{self.context.student.model}, so no weight would move. Its parameters have names such as "
                f"{', '.join(list(access.names)[:4])}."
            )
        self._anchor = access.read(names)

    def fires(self, completed_steps: int) -> bool:
        return bool(self.cfg.tries) and extrapolate.fires(completed_steps)

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool:
        """Make a search if one is due after `completed_steps` steps; True if it moved the weights.
        RefluxError if the score of the current weights is not finite.
        """
        if not self.fires(completed_steps):
            return False
        started, access = time.perf_counter(), required(access, "extrapolation")
        delta = self._displacement(access)
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in delta.values()))
        path = _Path(access, access.base(delta), delta)
        trials = await self._trials(path, score, completed_steps) if norm else []
        accepted = max((trial.multiple for trial in trials if self._beats(trial)), default=0)
        if trials:
            path.go(accepted)
        self._anchor = access.read(delta)
        self._report(completed_steps, trials, accepted, norm, score.spent, time.perf_counter() - started)
        return accepted > 0

    def _displacement(self, access: WeightAccess) -> Weights:
        """W - anchor. Each tensor of the anchor is released when it has been used, because a new anchor
        follows the search. At most two copies are in memory at a time.
        """
        return {
            name: value - self._anchor.pop(name) for name, value in access.read(list(self._anchor)).items()
        }

    async def _trials(self, path: _Path, score: Score, completed_steps: int) -> list[Trial]:
        """Candidates in order. If one was not accepted, it is the last."""
        trials: list[Trial] = []
        best, incumbent = 0, math.nan
        for number, multiple in enumerate(extrapolate.multiples(self.cfg.tries)):
            rng = number if self.cfg.rescore_incumbent else 0
            if not number or self.cfg.rescore_incumbent:
                path.go(best)
                incumbent = _finite(await score(rng), best, completed_steps)
            path.go(multiple)
            trials.append(Trial(multiple, await score(rng), incumbent))
            if not self._beats(trials[-1]):
                break
            best, incumbent = multiple, trials[-1].score
        return trials

    def _beats(self, trial: Trial) -> bool:
        if not math.isfinite(trial.score):
            return False
        return trial.score > trial.against or (
            self.cfg.accept == "not_worse" and trial.score == trial.against
        )

    def _report(
        self, step: int, trials: list[Trial], accepted: int, norm: float, spent: Spent, seconds: float
    ) -> None:
        for trial in trials:
            if not math.isfinite(trial.score):
                self.services.listener.noted(
                    f"step {step}: the jump by {trial.multiple} displacements was rejected, because its "
                    f"score is {trial.score}"
                )
        row = {
            "step": step,
            "score": self.cfg.score,
            "here": trials[0].against if trials else None,
            "tried": [asdict(trial) for trial in trials],
            "accepted": accepted,
            "delta_norm": norm,
            "tokens": spent.sampled,
            "ungraded": spent.ungraded,
            "seconds": round(seconds, 3),
        }
        self.services.append("searches.jsonl", row)

    def save(self, folder: Path) -> None:
        checkpoints.write(folder, {ANCHOR + name: value for name, value in self._anchor.items()})

    def load(self, folder: Path) -> None:
        """Restore the anchor from the folder of a checkpoint. RunError if the checkpoint has no anchor."""
        state = checkpoints.read(folder) if any(folder.iterdir()) else {}
        self._anchor = {
            key.removeprefix(ANCHOR): value for key, value in state.items() if key.startswith(ANCHOR)
        }
        if not self._anchor:
            raise RunError(
                "the checkpoint that this run resumes from has no anchor, so the displacement since the last "
                "search is not known. The checkpoint was made without extrapolation: resume it with "
                "extrapolation=none, or start a new run."
            )


@dataclass(frozen=True)
class _Path:
    """The line through the current weights along their displacement."""

    access: WeightAccess
    base: Weights
    delta: Weights

    def go(self, multiple: int) -> None:
        """Write the current weights plus `multiple` displacements; at 0 the current weights are restored bit
        for bit.
        """
        moved = {
            name: torch.add(value, self.delta[name], alpha=multiple) for name, value in self.base.items()
        }
        self.access.write(moved if multiple else self.base)


def _finite(score: float, best: int, step: int) -> float:
    if not math.isfinite(score):
        where = f"at the accepted jump by {best}" if best else "at its current weights"
        raise RefluxError(
            f"step {step}: extrapolation's score of the student {where} is {score}, so nothing can be "
            "compared with it. Usual reasons: "
            "the verifier judged none of the answers (accuracy), or the teacher gives probability 0 to a "
            "token that the student sampled (minus_kl). Use the other score, or start a run without "
            "extrapolation."
        )
    return score
