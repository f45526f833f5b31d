"""The number of directions in which the weights move, and how early these directions appear."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import EFFOPD, Paper
from reflux.config.registry import STRICT
from reflux.errors import ConfigError, RunError
from reflux.evals.base import Asked, EvalPart
from reflux.evals.spectra import (
    K,
    alignment,
    alignment_of,
    directions,
    effective_rank,
    effective_rank_of,
    rho,
    rho_of,
    spectral_norm,
    top_norm_ratio,
    top_norm_ratio_of,
)
from reflux.learners.access import INCLUDE, WeightAccess, moved, required
from reflux.storage import files

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig
    from reflux.evals.base import Source
    from reflux.evals.evaluation import Evaluation
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded

__all__ = ["Foresight", "alignment", "effective_rank", "foresight", "rho", "spectral_norm", "top_norm_ratio"]

FILE = "matrices.safetensors"
NAMES = ("spectral_norm", "rho", "effective_rank", "top_norm_ratio")


@dataclass(frozen=True, config=STRICT)
class Foresight(EvalPart):
    """Spectra of the change of attention and MLP matrices since the start, as means over the matrices.

    The change is computed in float32 with adapters merged. The result has `spectral_norm`, `rho`,
    `effective_rank`, `top_norm_ratio` (see evals.spectra), `matrices` (their number) and `unmoved`, the
    number of matrices that did not change. Those are left out of the means. If no matrix changed, the means
    are null. `alignment` gives for each earlier evaluation, by step, the alignment of its leading `k`
    directions with the current ones. In the last evaluation this is the alignment with the end of training.

    percent: the percentage in top_norm_ratio. The paper uses 1. With 1 and min(rows, columns) of at most 100
    the ratio equals rho; use 10 there. include: parts of parameter names, as in extrapolation.extrapolate.
    The start weights and the leading left singular vectors of every evaluation are stored in the run
    directory, under parts/evals.NAME/. Cost: an exact singular value decomposition of every matrix on the
    CPU. For matrices with up to a few hundred rows this is negligible compared with a step; with a few
    thousand rows it takes seconds per matrix. RunError if this evaluation is added after the first step of
    the run.

    Training reads nothing of this (law 8). arXiv 2605.11739.
    """

    asked: ClassVar[Asked] = "always"
    split = None
    max_tokens = None

    percent: Annotated[float, Field(gt=0, le=100)] = 1.0
    k: Annotated[int, Field(ge=1)] = K
    include: tuple[str, ...] = INCLUDE

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (EFFOPD,)

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        from reflux.reports.foresight_charts import foresight_charts, read_spectra

        return foresight_charts(read_spectra(recorded.rows("evals")))

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        """The result, by key. ConfigError if `include` matches no matrix, RunError if the start weights are
        missing.
        """
        access = required(source.access, "evals.foresight")
        return await evaluation.services.run_model(self._measure, access, source.folder, evaluation.step)

    def _measure(self, access: WeightAccess, folder: Path, step: int) -> dict[str, Any]:
        weights = {
            name: value
            for name, value in access.read(moved(access.names, self.include)).items()
            if value.ndim == 2
        }
        if not weights:
            raise ConfigError(
                f"evals.foresight: include = {list(self.include)} matches no matrix of the student"
            )
        if not step:
            _write(folder / "start", weights)
        start = _read(folder / "start")
        if not start:
            raise RunError(
                f"evals.foresight compares with the start weights of the run, and {folder / 'start'} does "
                "not contain them: the evaluation was switched on after the first step, or its folder was "
                "removed. Use evals.foresight=none, or start a new run."
            )
        means, vectors = _spectra(weights, start, self.percent, self.k)
        _write(folder / f"step-{step}", vectors)
        earlier = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
        return {
            **means,
            "alignment": {str(then): _aligned(folder, then, vectors) for then in earlier if 0 < then < step},
        }


def foresight(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], percent: float = 1.0
) -> dict[str, float | int | None]:
    """The means of spectral_norm, rho, effective_rank and top_norm_ratio over the attention and MLP matrices
    of `weights`, chosen by their names.

    percent: of top_norm_ratio. `matrices` is their number, and `unmoved` the number of matrices that are
    equal to those in `start`. Unmoved matrices are left out of the means, which are None if all are unmoved.
    ValueError for a matrix that is missing in `start` or has another shape there, and for values that are not
    finite.
    """
    chosen = {name: weights[name] for name in moved(weights, INCLUDE) if weights[name].ndim == 2}
    return _spectra(chosen, start, percent, k=1)[0]


def _spectra(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], percent: float, k: int
) -> tuple[dict[str, float | int | None], dict[str, Tensor]]:
    """The means, and the first k left singular vectors of each matrix that changed."""
    found: list[tuple[float, ...]] = []
    vectors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in start or start[name].shape != value.shape:
            raise ValueError(f"{name} has no start weights of its shape")
        delta = value - start[name]
        if not delta.any():
            continue
        s, vectors[name] = directions(delta, k)
        found.append((float(s[0]), rho_of(s), effective_rank_of(s), top_norm_ratio_of(s, percent)))
    columns = zip(*found, strict=True) if found else [()] * len(NAMES)
    means = {
        name: statistics.fmean(column) if column else None
        for name, column in zip(NAMES, columns, strict=True)
    }
    return {**means, "matrices": len(weights), "unmoved": len(weights) - len(found)}, vectors


def _aligned(folder: Path, step: int, vectors: Mapping[str, Tensor]) -> float | None:
    """The mean alignment over the matrices that had changed both at that step and now."""
    then = _read(folder / f"step-{step}")
    both = [
        alignment_of(then[name], vectors[name])
        for name in vectors
        if name in then and then[name].shape == vectors[name].shape
    ]
    return statistics.fmean(both) if both else None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a folder with one file. The folder is complete or absent."""
    from safetensors.torch import save_file

    files.write_folder(path, lambda scratch: save_file(dict(tensors), scratch / FILE))


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / FILE) if (path / FILE).is_file() else {}
