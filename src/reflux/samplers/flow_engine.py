"""The model of `samplers.flow`. The requests of one cohort (the groups of one optimiser step that are
requested together) are denoised together, with one velocity call per step.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.models.flow.load import load_flow
from reflux.models.flow.sde import sde_step, step_logp
from reflux.models.rng import normal, row_key
from reflux.samplers.flow import prompt_text
from reflux.samplers.in_process_sampler import InProcessSampler, Request
from reflux.types import Attempt, Finish, FlowRollout, Group, Prompt, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.models.flow.flow_model import FlowModel
    from reflux.runtime.services import Services
    from reflux.samplers.flow import Flow


@dataclass
class Trajectory:
    """How images are denoised: the times, which are those of the first T steps of a grid, and the noise
    level.
    """

    # Times from noise to data, float32.
    t_S: np.ndarray
    # True if the trajectory ends at t = 0.
    whole: bool
    noise_level: float
    guidance: float
    # True if velocities are recorded.
    keeps_v: bool
    # True if states are recorded.
    keeps_x: bool


@dataclass
class Path:
    """The recorded trajectories of B images, on the host."""

    # States; [B, S, 0] if states are not recorded.
    x_BSD: np.ndarray
    # The last state of each image.
    x_BD: np.ndarray
    # True where a state is finite.
    finite_BS: np.ndarray
    # Log-density of each step in nats; 0 along the ODE.
    logp_BT: np.ndarray
    v_BTD: np.ndarray | None
    images: list[np.ndarray]


@torch.inference_mode()
def denoise(
    model: FlowModel, trajectory: Trajectory, texts: Sequence[str], keys_B: Sequence[int], pixels: int = 0
) -> Path:
    """Sample one image for each of `texts`, with random numbers from the key at the same index of keys_B.
    Records stay on the device until the end and are copied once. pixels: the side of an image; 0: the size
    that the model was made for.
    """
    T, B, D = len(trajectory.t_S) - 1, len(texts), int(np.prod(model.shape(pixels)))
    kept = D if trajectory.keeps_x else 0
    # Read once, because diffusers searches all modules for it.
    device = model.device
    keys = torch.tensor(keys_B, dtype=torch.int64, device=device)
    x_BSD = torch.empty(B, T + 1, kept, device=device)
    finite_BS = torch.ones(B, T + 1, dtype=torch.bool, device=device)
    v_BTD = torch.empty(B, T, D, device=device) if trajectory.keeps_v else None
    logp_BT = torch.zeros(B, T, device=device)
    x_BD = normal(keys, -1, D)
    x_BSD[:, 0] = x_BD[:, :kept]
    for i, (t, dt) in enumerate(
        zip(trajectory.t_S[:-1].tolist(), np.diff(trajectory.t_S).tolist(), strict=True)
    ):
        v_BD = model.velocity(x_BD, torch.full((B,), t, device=device), texts, trajectory.guidance).float()
        noise_BD = normal(keys, i, D) if trajectory.noise_level else torch.zeros_like(x_BD)
        x_BD, mean_BD, std = sde_step(x_BD, v_BD, t, dt, trajectory.noise_level, noise_BD)
        x_BSD[:, i + 1] = x_BD[:, :kept]
        finite_BS[:, i + 1] = x_BD.isfinite().all(1)
        if trajectory.noise_level:
            logp_BT[:, i] = step_logp(x_BD, mean_BD, std)
        if v_BTD is not None:
            v_BTD[:, i] = v_BD
    x_BSD, finite_BS, logp_BT = x_BSD.cpu().numpy(), finite_BS.cpu().numpy(), logp_BT.cpu().numpy()
    return Path(
        x_BSD,
        x_BD.cpu().numpy(),
        finite_BS,
        logp_BT,
        None if v_BTD is None else v_BTD.cpu().numpy(),
        model.images(x_BD),
    )


class FlowSampler(InProcessSampler):
    """A flow model that denoises images in batches."""

    def __init__(self, cfg: Flow, context: PartContext, services: Services, model: FlowModel):
        super().__init__(services, model, context.numbers)
        self.cfg, self.context = cfg, context

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Flow, context: PartContext, services: Services) -> AsyncIterator[FlowSampler]:
        name = context.student.model
        load = partial(
            load_flow, name, "learner.model", dtype=cfg.dtype, device=cfg.device, shared_cache=services.shared
        )
        model = await services.run_model(load)
        # Raises an error before sampling if the image size does not fit the model.
        model.shape(cfg.pixels)
        model.net.requires_grad_(False).eval()
        yield cls(cfg, context, services, model)

    async def _groups(self, requests: list[Request]) -> list[Group]:
        async with self.live.call():
            return await self.services.run_model(self._sample, requests, interrupt=self.live.stop)

    def _sample(self, requests: list[Request]) -> list[Group]:
        started = time.perf_counter()
        draw = requests[0][2]
        trajectory = self._trajectory(draw)
        rows = [(prompt, sample) for prompt, n, _ in requests for sample in range(n)]
        size = self.cfg.batch_images
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        made: list[Attempt] = []
        for chunk in chunks:
            # All steps of a trajectory have the same weights.
            self.live.renew()
            made += map(Attempt, self._denoise(chunk, trajectory, draw))
        attempts = iter(made)
        groups = [[next(attempts) for _ in range(n)] for _, n, _ in requests]
        self.services.clock.sampled(draw, started)
        return groups

    def _trajectory(self, draw: SamplingParams) -> Trajectory:
        """Training attempts are noisy and may stop early. Other attempts are noisy if the temperature is
        above 0, and always run to the end.
        """
        training = draw.purpose == "train"
        noisy = training or draw.temperature > 0
        grid_S = self.model.grid(self.cfg.steps if noisy else self.cfg.eval_steps).astype(np.float32)
        steps = min(max(1, draw.max_positions), len(grid_S) - 1) if training else len(grid_S) - 1
        return Trajectory(
            t_S=grid_S[: steps + 1],
            whole=steps == len(grid_S) - 1,
            noise_level=self.cfg.noise_level if noisy else 0.0,
            guidance=self.cfg.guidance,
            keeps_v=self.context.requirements.behaviour > 0 if training else noisy,
            keeps_x=noisy,
        )

    def _denoise(
        self, rows: Sequence[tuple[Prompt, int]], trajectory: Trajectory, draw: SamplingParams
    ) -> list[FlowRollout]:
        keys = [
            row_key(self.context.seed, draw.purpose, draw.step, prompt.key, sample, rng=draw.rng)
            for prompt, sample in rows
        ]
        path = denoise(
            self.model, trajectory, [prompt_text(prompt) for prompt, _ in rows], keys, self.cfg.pixels
        )
        for (prompt, _), finite_S in zip(rows, path.finite_BS, strict=True):
            _check_finite(prompt, finite_S, trajectory)
        return [
            self._rollout(prompt, sample, row, path, trajectory) for row, (prompt, sample) in enumerate(rows)
        ]

    def _rollout(
        self, prompt: Prompt, sample: int, row: int, path: Path, trajectory: Trajectory
    ) -> FlowRollout:
        finish: Finish = "stop" if trajectory.whole else "length"
        # A state that was not recorded cannot be scored.
        mask_T = np.full(len(trajectory.t_S) - 1, trajectory.keeps_x)
        # The last step of a whole grid of times is never trained.
        mask_T[-1] &= not trajectory.whole
        behaviour = None
        if path.v_BTD is not None:
            behaviour = VelocityTarget(
                teacher="behaviour", v_TD=np.where(mask_T[:, None], path.v_BTD[row], np.float32(np.nan))
            )
        return FlowRollout(
            prompt=prompt,
            sample=sample,
            version=self.version,
            finish=finish,
            mask_T=mask_T,
            logp_T=np.where(mask_T, path.logp_BT[row], np.float32(0)),
            behaviour=behaviour,
            x_SD=path.x_BSD[row],
            t_S=trajectory.t_S,
            noise_level=trajectory.noise_level,
            guidance=trajectory.guidance,
            image=path.images[row],
        )


def _check_finite(prompt: Prompt, finite_S: np.ndarray, trajectory: Trajectory) -> None:
    """Raise ModelError at the first state that is not finite. A velocity that is not finite makes the next
    state not finite, so only the states are checked, and they are checked after the last step.
    """
    if not finite_S.all():
        i = int(finite_S.argmin()) - 1
        raise ModelError(
            f"prompt {prompt.id}: at denoising step {i} (from 0, of {len(trajectory.t_S) - 1}; t = "
            f"{trajectory.t_S[i]:.4g}) the velocity, or the state "
            "it leads to, is not finite. With 16 bits this may be an overflow: try sampler.dtype = "
            "'bfloat16' or 'float32'. Otherwise the weights are broken, by a learning rate that is too high "
            "or from the start."
        )
