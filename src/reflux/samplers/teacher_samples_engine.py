"""The models of `samplers.teacher_samples`. The teachers sample images, and each image becomes states on
straight lines from noise to it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.config.step_context import SamplingParams
from reflux.errors import DataError, ModelError
from reflux.models.rng import normal, row_key
from reflux.runtime.cohorts import Gather
from reflux.samplers.flow import prompt_text
from reflux.samplers.flow_engine import Trajectory, denoise
from reflux.samplers.teacher_samples import drawers
from reflux.types import Attempt, FlowRollout, Group, Prompt, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.models.flow.flow_model import FlowModel
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.samplers.base import OpenSampler
    from reflux.samplers.teacher_samples import TeacherSamples

# Position key of the random numbers of the times. Key -1 is the noise that an image is sampled from, and keys
# 0 to T - 1 are the noises of the positions.
_TIMES = -2
# A prompt, and the index of the attempt in its group.
Row = tuple[Prompt, int]


class OpenTeacherSamples:
    """The open sampler. It holds no weights of its own: the teachers' models sample the training images, and
    `inner` samples from the student in evaluations.
    """

    def __init__(
        self,
        cfg: TeacherSamples,
        context: PartContext,
        services: Services,
        inner: OpenSampler,
        models: Mapping[str, FlowModel],
    ):
        self.cfg, self.context, self.services, self.inner, self.models = cfg, context, services, inner, models
        self.version = 0
        self._gather: Gather[tuple[Prompt, int, SamplingParams], Group] = Gather(self._cohort)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: TeacherSamples, context: PartContext, services: Services
    ) -> AsyncIterator[OpenTeacherSamples]:
        async with AsyncExitStack() as stack:
            inner = await stack.enter_async_context(cfg.generate.open(context, services))
            tables = {table: teacher for table, teacher in context.teachers.items() if teacher.draws}
            answers = {
                table: await stack.enter_async_context(teacher.open(replace(context, name=table), services))
                for table, teacher in tables.items()
            }
            yield cls(
                cfg,
                context,
                services,
                inner,
                {table: tables[table].acts_with(opened) for table, opened in answers.items()},
            )

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        if draw.purpose != "train":
            return await self.inner.sample(prompt, n, draw)
        return await self._gather.ask(draw.step, draw.cohort, prompt.key, (prompt, n, draw))

    async def publish(self, weights: Weights, step: int) -> None:
        self.version = weights.version
        await self.inner.publish(weights, step)

    async def _cohort(self, requests: list[tuple[Prompt, int, SamplingParams]]) -> list[Group]:
        return await self.services.run_model(self._sample, requests)

    def _sample(self, requests: list[tuple[Prompt, int, SamplingParams]]) -> list[Group]:
        started = time.perf_counter()
        by_table: dict[str, list[Row]] = {}
        for prompt, n, _ in requests:
            by_table.setdefault(self._drawer(prompt), []).extend((prompt, sample) for sample in range(n))
        found: dict[tuple[str, int], Attempt] = {}
        for table, rows in by_table.items():
            for start in range(0, len(rows), self.cfg.generate.batch_images):
                some = rows[start : start + self.cfg.generate.batch_images]
                rollouts = self._rollouts(table, some, requests[0][2])
                found |= {
                    (prompt.key, sample): Attempt(rollout)
                    for (prompt, sample), rollout in zip(some, rollouts, strict=True)
                }
        self.services.clock.sampled(requests[0][2], started)
        return [[found[prompt.key, sample] for sample in range(n)] for prompt, n, _ in requests]

    def _drawer(self, prompt: Prompt) -> str:
        tables = drawers(self.context.teachers, prompt.route)
        if len(tables) != 1:
            raise DataError(
                f"prompt {prompt.id} has the route {prompt.route!r}, for which "
                f"{' and '.join(tables) or 'no teacher'} would sample. Sampler "
                "'teacher_samples' needs exactly one teacher table of kind flow for this route: give the "
                "route to that table, or leave the other teacher tables out."
            )
        return tables[0]

    def _rollouts(self, table: str, rows: Sequence[Row], draw: SamplingParams) -> list[FlowRollout]:
        """Sample images by the ODE, and build states between noise and each image."""
        model, cfg = self.models[table], self.cfg.generate
        t_S = model.grid(cfg.eval_steps).astype(np.float32)
        trajectory = Trajectory(
            t_S=t_S, whole=True, noise_level=0.0, guidance=cfg.guidance, keeps_v=False, keeps_x=False
        )
        keys = [
            row_key(self.context.seed, draw.purpose, draw.step, prompt.key, sample, rng=draw.rng)
            for prompt, sample in rows
        ]
        path = denoise(model, trajectory, [prompt_text(prompt) for prompt, _ in rows], keys, cfg.pixels)
        x_0_BD = path.x_BD
        for (prompt, _), x_0_D in zip(rows, x_0_BD, strict=True):
            if not np.isfinite(x_0_D).all():
                raise ModelError(
                    f"teachers.{table}: its image for prompt {prompt.id} is not finite. Check that its "
                    "weights are complete."
                )
        t_BT, noise_BTD = lines(keys, draw.max_positions, x_0_BD.shape[1])
        return [
            self._rollout(*row, x_0_D, t_T, noise_TD, image, {table: len(trajectory.t_S) - 1})
            for row, x_0_D, t_T, noise_TD, image in zip(
                rows, x_0_BD, t_BT, noise_BTD, path.images, strict=True
            )
        ]

    def _rollout(
        self,
        prompt: Prompt,
        sample: int,
        x_0_D: np.ndarray,
        t_T: np.ndarray,
        noise_TD: np.ndarray,
        image: np.ndarray,
        drawn: dict[str, int],
    ) -> FlowRollout:
        # Rising times, without duplicates.
        t_T, order = np.unique(t_T, return_index=True)
        t_T, noise_TD = t_T[::-1], noise_TD[order[::-1]]
        states_TD = (1 - t_T[:, None]) * x_0_D + t_T[:, None] * noise_TD
        return FlowRollout(
            prompt=prompt,
            sample=sample,
            version=self.version,
            finish="stop",
            mask_T=np.ones(len(t_T), dtype=bool),
            # These steps were not sampled, so they have no log-probs. `checks` refuses objectives that use a
            # ratio.
            logp_T=np.zeros(len(t_T), dtype=np.float32),
            behaviour=VelocityTarget(teacher="behaviour", v_TD=noise_TD - x_0_D),
            sampled_positions=0,
            drawn_positions=drawn,
            x_SD=np.concatenate([states_TD, x_0_D[None]]),
            t_S=np.append(t_T, np.float32(0)),
            noise_level=0.0,
            guidance=self.cfg.generate.guidance,
            image=image,
        )


def lines(keys_B: Sequence[int], times: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(t_BT, noise_BTD), float32: each row has its own times, the sigmoid of standard normals, and each time
    has its own standard normal noise. keys_B: the keys of the random numbers, one per row. times: T. size: D.
    """
    keys = torch.tensor(keys_B, dtype=torch.int64)
    t_BT = normal(keys, _TIMES, times).sigmoid()
    noise_BTD = torch.stack([normal(keys, position, size) for position in range(times)], dim=1)
    return t_BT.numpy(), noise_BTD.numpy()
