"""Repeated draws of whole gradients: the noise of each arm's gradient, and its direction relative to the
exact gradient.

At a fixed student, M batches of attempts are sampled at the same prompts with different random numbers. On
each batch the library's learner computes every arm's gradient of the whole model (a step of size 0, without
clipping). All arms use the same attempts, so they differ only in the noise of their estimator. Reported per
arm: the total variance mean |g|^2 - |mean g|^2 in its unbiased form, its ratio to that of the baseline arm,
the squared norm of the expected gradient, and the cosine of the expected gradient with that of the reference
arm, each with a jackknife interval over draws. The exact objective has a variance too, because it is
evaluated at sampled prefixes. This variance is the lower bound of the other arms' variance.

This file has no command of its own. Use `python studies/run.py STUDY --out OUT --variance`.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from arms import Study
from gram import at, cosine, inner, of_means, total_variance
from intervals import Estimate, jackknife
from table import cell, decimals, grid, plain

from reflux import checks
from reflux.config.overrides import merge
from reflux.config.recipe import RunConfig, differences, from_table, to_table
from reflux.config.step_context import seed_of
from reflux.credit.base import share_credit
from reflux.errors import ConfigError, RunError, Stopped
from reflux.learners.gradient_learner import GradientLearner
from reflux.learners.learning import observe
from reflux.loop import Parts, lasting, open_parts
from reflux.loss.step import StepRequest
from reflux.runtime.library_logging import quiet_libraries
from reflux.storage import checkpoints
from reflux.storage.files import write_text
from reflux.training import Options, Run
from reflux.types import Group, Prompt

UNCLIPPED = 1e30
# A seed for random numbers and prompts that no run of a study uses.
SEED = seed_of("gradient variance") % (1 << 31)
NOTE = (
    "95 % jackknife intervals over draws; the same attempts for every arm. "
    "Cosine: between expected gradients, noise removed."
)


def still(cfg: RunConfig) -> RunConfig:
    """The config of an arm with a learning rate of 0 and the seed of this file."""
    return from_table(
        merge(to_table(cfg), {"learner": {"lr": 0.0, "clip": UNCLIPPED}, "seed": SEED, "log_variance": False})
    )


def same_but_for_objectives(cfgs: Mapping[str, RunConfig]) -> None:
    """Raises ConfigError if two arms cannot be trained on the same attempts."""
    tables = {
        arm: {key: value for key, value in to_table(cfg).items() if key not in ("objectives", "recipe")}
        for arm, cfg in cfgs.items()
    }
    first = next(iter(tables))
    for arm, table in tables.items():
        changed = differences(tables[first], table)
        if changed:
            raise ConfigError(
                f"arms {first} and {arm} cannot be trained on the same attempts; set these differing keys in "
                "[variance.common]:\n  " + "\n  ".join(changed)
            )


async def draw_gradients(
    cfgs: Mapping[str, RunConfig], draws: int, weights: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """g_MD of every arm, float32: M draws of the gradient of all D trained weights. weights: a learner's
    state, or None for the weights that the recipe loads.
    """
    same_but_for_objectives(cfgs)
    first = next(iter(cfgs.values()))
    every = replace(
        first, objectives=tuple(objective for cfg in cfgs.values() for objective in cfg.objectives)
    )
    found: dict[str, list[np.ndarray]] = {arm: [] for arm in cfgs}
    with tempfile.TemporaryDirectory() as scratch:
        run = Run.open(first, checks.join(every), Options(Path(scratch) / "draws"))
        prompts = list(islice(run.prompts, first.prompts_per_step))
        async with lasting(run), open_parts(first, run.context, run.services) as parts:
            learner, sampler, _, _, _ = parts
            if not isinstance(learner, GradientLearner):
                raise ConfigError(
                    "learner: this study reads the gradients of a learner of the library; use kind = hf "
                    "or flow."
                )
            if weights is not None:
                learner.take_up(weights)
            await sampler.publish(learner.publish(), 0)
            for m in range(draws):
                groups = await attempts(run, parts, prompts, m)
                for arm, cfg in cfgs.items():
                    request = StepRequest(groups, cfg.objectives, run.step_context(m), cfg.loss_aggregation)
                    found[arm].append(await gradient(learner, request))
                if run.stopping:
                    raise Stopped(f"stopped after draw {m + 1} of {draws}")
    return {arm: np.stack(gradients) for arm, gradients in found.items()}


async def attempts(run: Run, parts: Parts, prompts: Sequence[Prompt], m: int) -> list[Group]:
    """Draw m at the prompts, sampled as the loop samples the batch of a step. The length limits are those of
    the recipe's first step.
    """
    learner, sampler, rewards, teachers, _ = parts
    draw = replace(run.cfg.draw(0), step=m)
    groups = list(
        await asyncio.gather(*(sampler.sample(prompt, run.cfg.group_size, draw) for prompt in prompts))
    )
    await asyncio.gather(*map(rewards.judge, groups))
    await teachers.score(groups, run.step_context(m))
    await observe(learner, groups)
    share_credit(groups, run.cfg.credit, run.step_context(m))
    return groups


async def gradient(learner: GradientLearner, request: StepRequest) -> np.ndarray:
    """The gradient of all trained weights as one row, float32."""
    # after a batch without any loss the gradient must be empty and not the old one
    learner.optimiser.zero_grad(set_to_none=True)
    await learner.step(request)
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in learner.trained.values()]
    return np.concatenate([part.detach().float().cpu().numpy().ravel() for part in gradients])


def statistics(g_MD: Mapping[str, np.ndarray], baseline: str, reference: str | None) -> dict[str, Any]:
    """The estimates of each arm that the docstring of this file names."""
    own = {arm: inner(g, g) for arm, g in g_MD.items()}
    table: dict[str, Any] = {}
    for arm, K in own.items():
        found = {
            "total_variance": jackknife(lambda kept, K=K: total_variance(at(K, kept)), len(K)),
            "squared_mean": jackknife(lambda kept, K=K: of_means(at(K, kept)), len(K)),
        }
        if baseline in own and arm != baseline:
            found[f"ratio_to_{baseline}"] = jackknife(
                lambda kept, K=K: _ratio(
                    total_variance(at(K, kept)), total_variance(at(own[baseline], kept))
                ),
                len(K),
                log=True,
            )
        if reference in own and arm != reference:
            cross = inner(g_MD[arm], g_MD[reference])
            found[f"cosine_to_{reference}"] = jackknife(
                lambda kept, K=K, cross=cross: cosine(at(K, kept), at(cross, kept), at(own[reference], kept)),
                len(K),
            )
        table[arm] = found
    return table


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def state_of(student: str, out: Path, seed: int) -> Mapping[str, Any] | None:
    """The learner's state for "start" (None: as the recipe loads it) or "ARM@STEP". Raises RunError if that
    checkpoint does not exist.
    """
    if student == "start":
        return None
    arm, _, step = student.partition("@")
    folder = out / arm / f"seed-{seed}" / "checkpoints"
    known = checkpoints.steps(folder)
    if not step.isdigit() or int(step) not in known:
        kept = ", ".join(map(str, known)) or "none"
        raise RunError(
            f"no student '{student}': {arm} seed {seed} has checkpoints at steps: {kept}. Run the study "
            "first, or name one of these steps."
        )
    return checkpoints.read(checkpoints.of_step(folder, int(step)) / "learner")


@dataclass(frozen=True)
class Drawing:
    """The settings: arms on the same attempts, at each student, with M = draws. ConfigError for fewer than 3
    draws.
    """

    arms: tuple[str, ...]
    students: tuple[str, ...]
    draws: int
    # The seed of the runs whose checkpoints are the students.
    seed: int

    def __post_init__(self) -> None:
        if self.draws < 3:
            raise ConfigError(f"an interval over draws needs at least 3 of them, got {self.draws}")


def write_variance(
    study: Study, drawing: Drawing, out: Path, overrides: Sequence[str], born: dict[str, Any]
) -> str:
    """Draw gradients at every student and write variance.json and variance.md. Returns the text of the
    latter. A student that already has draws is skipped.

    born: the provenance of the numbers, for the files. ConfigError if the study has no [variance] table.
    """
    if study.variance is None:
        raise ConfigError(
            f"study {study.name} has no [variance] table, so it draws no gradients; studies/vopd.toml has one"
        )
    quiet_libraries()
    cfgs = {arm: still(study.config(arm, overrides, study.variance.common)) for arm in drawing.arms}
    done = {**plain(asdict(drawing)), **{key: born[key] for key in ("study_hash", "table_made_at_commit")}}
    # all states are loaded before the first draw, so that a missing one is found early
    students = {student: state_of(student, out, drawing.seed) for student in drawing.students}
    tables = {}
    for student, weights in students.items():
        path, key = out / f"variance-{student}.json", {**done, "students": [student]}
        before = json.loads(path.read_text()) if path.exists() else {}
        if {name: before.get(name) for name in key} != key:
            g_MD = asyncio.run(draw_gradients(cfgs, drawing.draws, weights))
            before = {**key, "estimates": plain(statistics(g_MD, study.baseline, study.variance.reference))}
            write_text(path, json.dumps(before, indent=2) + "\n")
        tables[student] = before["estimates"]
    text = f"# {study.name}: whole gradients\n\n" + "\n".join(
        _shown(student, table) for student, table in tables.items()
    )
    text += f"\n{NOTE}\n\nCommand: `{born['command']}`  \n"
    text += f"Commit {born['table_made_at_commit']}; study {born['study_hash']}; "
    text += f"{drawing.draws} draws; students of seed {drawing.seed}; threads {born['threads']}\n"
    write_text(out / "variance.json", json.dumps({**born, **done, "estimates": tables}, indent=2) + "\n")
    write_text(out / "variance.md", text)
    return text


def _shown(student: str, table: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [["arm", *(name.replace("_", " ") for name in names)]]
    for arm, row in table.items():
        estimates = [Estimate(**row[name]) if name in row else None for name in names]
        rows.append(
            [
                arm,
                *(
                    cell(estimate, scientific if "_to_" not in name else decimals(3))
                    for name, estimate in zip(names, estimates, strict=True)
                ),
            ]
        )
    return f"Student {student}\n\n{grid(rows)}\n"


def scientific(value: float) -> str:
    return f"{value:.3g}"
