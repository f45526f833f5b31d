"""How well the teacher ranks a student's attempts: the mean return G by verdict, and the share of wrong
attempts with a higher return than a correct one.

    python studies/inversions.py [--recipe uni_opd] [--prompts 512] [--samples 8] [--split test] [--seed 0]
                                 [--set key.path=value]

There is no training: the recipe's student answers held-out prompts, and its teachers give log-probs of the
tokens. Prints one JSON object, with all numbers also by route. G is in nats per token (see
reflux.credit.margin). A pair is a correct and a wrong attempt at one prompt; it is an inversion if G of the
wrong attempt >= G of the correct one. For prompts: the share with at least one inversion, and the share that
is mixed without an inversion, of all prompts. 95 % intervals by bootstrap over prompts; arXiv 2605.03677,
figure of section 3.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.credit.log_ratio import log_ratio_T
from reflux.loop import lasting, open_parts
from reflux.training import Options, Run
from reflux.types import Group

RESAMPLES = 2000
TEACHER = "main"


@dataclass(frozen=True)
class Ranked:
    """The returns of one prompt's attempts by verdict. `cut`: those of attempts that hit the length limit."""

    route: str | None
    correct: tuple[float, ...]
    wrong: tuple[float, ...]
    cut: tuple[float, ...]

    @property
    def pairs(self) -> int:
        return len(self.correct) * len(self.wrong)

    @property
    def inverted(self) -> int:
        return sum(bad >= good for good in self.correct for bad in self.wrong)


def ranked(group: Group, threshold: float = 0.5) -> Ranked:
    """The returns of a group's attempts. Attempts without a verdict or a return are left out."""
    correct, wrong, cut = [], [], []
    for attempt in group:
        ratio_T, verdict = log_ratio_T(attempt, TEACHER), attempt.verdict
        if verdict is None or ratio_T is None or not np.isfinite(ratio_T).any():
            continue
        value = float(ratio_T[np.isfinite(ratio_T)].mean())
        (correct if verdict >= threshold else wrong).append(value)
        if attempt.rollout.finish == "length":
            cut.append(value)
    return Ranked(group[0].rollout.prompt.route, tuple(correct), tuple(wrong), tuple(cut))


def table(prompts: Sequence[Ranked], seed: int) -> dict[str, Any]:
    """Each number with its interval over prompts: [value, low, high]. null if there was no observation."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(prompts), size=len(prompts)) for _ in range(RESAMPLES)]

    def share(top: Callable[[Ranked], float], below: Callable[[Ranked], float]) -> list[float] | None:
        above, under = (np.array([count(one) for one in prompts], dtype=float) for count in (top, below))
        if not under.sum():
            return None
        drawn = [above[rows].sum() / under[rows].sum() for rows in draws if under[rows].sum()]
        return [
            round(float(value), 4)
            for value in (above.sum() / under.sum(), *np.quantile(drawn, [0.025, 0.975]))
        ]

    return {
        "prompts": len(prompts),
        "attempts": sum(len(one.correct) + len(one.wrong) for one in prompts),
        "accuracy": share(lambda one: len(one.correct), lambda one: len(one.correct) + len(one.wrong)),
        "G_correct": share(lambda one: sum(one.correct), lambda one: len(one.correct)),
        "G_wrong": share(lambda one: sum(one.wrong), lambda one: len(one.wrong)),
        "G_cut": share(lambda one: sum(one.cut), lambda one: len(one.cut)),
        "pairs_inverted": share(lambda one: one.inverted, lambda one: one.pairs),
        "prompts_with_an_inversion": share(lambda one: one.inverted > 0, lambda one: 1),
        "prompts_mixed_and_consistent": share(lambda one: one.pairs > 0 and not one.inverted, lambda one: 1),
    }


async def graded(cfg: RunConfig, prompts: int, samples: int, split: Any) -> list[Ranked]:
    """Attempts of the recipe's student at the first held-out prompts, with returns from its teachers."""
    cfg = replace(
        cfg, prompts_per_step=prompts, group_size=samples, max_staleness=0, evals={}, extrapolation=None
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = Run.open(cfg, Requirements(reward=True, logp=True), Options(Path(scratch) / "inversions"))
        async with (
            lasting(run),
            open_parts(cfg, run.context, run.services) as (learner, sampler, rewards, teachers, _),
        ):
            await sampler.publish(learner.publish(), 0)
            asked = list(islice(cfg.task.prompts(split, 0), prompts))
            draw = SamplingParams(
                0, "eval", cfg.evaluation_positions, stop=cfg.sampler.generation.stop, cohort=len(asked)
            )
            groups = list(await asyncio.gather(*(sampler.sample(prompt, samples, draw) for prompt in asked)))
            await asyncio.gather(*map(rewards.judge, groups))
            await teachers.score(groups, run.step_context())
    return [ranked(group) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        default="uni_opd",
        help="a recipe with [rewards.NAME] and a teacher with alias main (uni_opd)",
    )
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--seed", type=int, default=0, help="the seed of sampling and of the bootstrap (0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key.path=value",
        help="change the recipe; may be repeated",
    )
    asked = parser.parse_args()
    cfg = load_recipe(asked.recipe, [f"seed={asked.seed}", *asked.set])
    found = asyncio.run(graded(cfg, asked.prompts, asked.samples, asked.split))
    routes = sorted({one.route for one in found if one.route is not None})
    tables = {"all": table(found, asked.seed)}
    if len(routes) > 1:
        tables |= {route: table([one for one in found if one.route == route], asked.seed) for route in routes}
    print(
        json.dumps(
            {
                "recipe": asked.recipe,
                "samples": asked.samples,
                "split": asked.split,
                "set": asked.set,
                **tables,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
