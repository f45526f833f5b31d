"""Images sampled by the teachers in place of the student's own: plain flow matching, as a baseline and a cold
start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, PartOf
from reflux.config.step_context import SamplingParams
from reflux.samplers.flow import Flow
from reflux.samplers.wrapping import WrappingSampler
from reflux.types import FlowRollout, Rollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services

FLOW_MATCHING = Paper(
    "flow_matching",
    "Flow Matching for Generative Modeling",
    "2210.02747",
    2022,
    "Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt",
)


@dataclass(frozen=True, config=STRICT)
class TeacherSamples(WrappingSampler):
    """Flow matching (arXiv 2210.02747) on images x_0 that the teachers sample during training. Evaluations
    sample from the student with `generate`.

    The teachers are the `[teachers.NAME]` tables of the recipe with kind flow. A prompt goes to the table
    that lists the prompt's route, otherwise to the table without routes. The teacher samples by the ODE, in
    `generate.eval_steps` steps. An image is trained on at T = `positions` positions. Each position has its
    own noise x_1 and a time t that is the sigmoid of a standard normal (arXiv 2403.03206). The state is (1 -
    t) x_0 + t x_1, and the recorded velocity is x_1 - x_0, for `velocity_kl` with teacher = "behaviour" and
    weight = "mse". With teacher = "main" the target is the teacher's own velocity at these states instead.

    The states of an attempt do not form a chain: no state leads to the next one. Each state lies on its own
    straight line from noise to the image. A step of -t along the recorded velocity ends at the image, which
    is the last state, at t = 0. Times fall, as in every flow rollout, and all positions count. The guidance
    is that of `generate`, for sampling and for training: the student's guided velocity is fitted to guided
    images, and evaluations sample with the same guidance.

    The attempts were not sampled from the student. Objectives that weight by the student's probabilities are
    therefore not allowed.
    """

    on_policy: ClassVar[bool] = False
    rollouts: ClassVar[type[Rollout]] = FlowRollout
    asks_teachers: ClassVar[bool] = True

    # The sampler for evaluations. Its settings are also those with which the teachers sample.
    generate: Annotated[Flow, PartOf("samplers", default="flow")] = Flow()
    # Positions T of one image.
    positions: Annotated[int, Field(ge=1)] = 10

    def __post_init__(self) -> None:
        if not isinstance(self.generate, Flow):
            raise ValueError("generate samples images, so its kind must be 'flow'")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (FLOW_MATCHING,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        for route in sorted(cfg.task.routes or [], key=str):
            tables = drawers(cfg.teachers, route)
            if len(tables) != 1:
                found = f"{' and '.join(tables)} could sample it" if tables else "no teacher samples it"
                yield (
                    "sampler 'teacher_samples' lets the teacher of a prompt's route sample its image, and "
                    f"for the route {route!r} {found}. "
                    "Give that route to exactly one teacher table of kind flow, or leave the other "
                    "teacher tables out."
                )

    @property
    def computed_share(self) -> float:
        return self.generate.computed_share * max(self.generate.eval_steps, self.positions) / self.positions

    def draw(self, step: int) -> SamplingParams:
        return replace(self.generate.draw(step), max_positions=self.positions)

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.teacher_samples_engine import OpenTeacherSamples

        return OpenTeacherSamples.opened(self, context, services)


def drawers(teachers: Mapping[str, Any], route: str | None) -> list[str]:
    """The names of the teachers (keys of `[teachers]`) that can sample images for the prompts of a route:
    those whose `routes` contain it. If there are none, those without `routes`, which serve every prompt. The
    caller refuses a run in which this is not exactly one name.
    """
    tables = {table: teacher for table, teacher in teachers.items() if teacher.draws}
    named = [table for table, teacher in tables.items() if route in teacher.routes]
    return named or [table for table, teacher in tables.items() if not teacher.routes]
