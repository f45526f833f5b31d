"""The flow sampler: an image is drawn in `steps` Gaussian steps from noise (t = 1) to data (t = 0).

x_t = (1 - t) x_0 + t x_1 with x_1 standard normal, and a velocity v that estimates x_1 - x_0. The same marginals at every noise level a:

    dx = [ v + sigma^2 / (2t) (x + (1 - t) v) ] dt + sigma dw,     sigma(t) = a sqrt(t / (1 - t)),     run with dt < 0

(arXiv 2605.08063; Flow-GRPO, arXiv 2505.05470). One Euler-Maruyama step is `sde_step`; a = 0 is the ODE.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.context import Generation
from reflux.errors import DataError
from reflux.model_folders import Dtype
from reflux.papers import Paper
from reflux.parts import STRICT, kind_of
from reflux.samplers.base import SamplerPart
from reflux.schedules import Number, at, number
from reflux.types import Draw, FlowRollout, Prompt, Rollout

if TYPE_CHECKING:
    from reflux.config import RunConfig
    from reflux.context import PartContext
    from reflux.services import Services

Value = Any  # a float, a numpy array or a torch tensor
_ROUNDING = 1e-6  # of times, which are kept in float32

FLOW_GRPO = Paper(
    "flow_grpo",
    "Flow-GRPO: Training Flow Matching Models via Online RL",
    "2505.05470",
    2025,
    "Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and others",
)
GUIDANCE = Paper("guidance", "Classifier-Free Diffusion Guidance", "2207.12598", 2022, "Ho, Jonathan and Salimans, Tim")


@dataclass(frozen=True, config=STRICT)
class Flow(SamplerPart):
    """A flow model in this process, in batches; every image has its own dice.

    The noise depends on (run seed, purpose, step, prompt, sample, denoising step) alone: neighbours in a batch never change a draw's dice.
    Attempts of training, and all others at a temperature above 0, are drawn by the SDE at `noise_level` in `steps` steps; greedy
    ones (temperature 0) by the ODE in `eval_steps` steps, where the first noise is all that is drawn. Of those only the picture is kept, no
    state: what is only looked at is large, and nobody learns from it.

    `length`: only so many steps of the grid are walked in training (prefix by generation), and the image is the state reached. Evaluations
    walk to the end. The velocity's guidance g is v_uncond + g (v_cond - v_uncond); teachers and learner use the same.
    """

    on_policy: ClassVar[bool] = True
    rollouts: ClassVar[type[Rollout]] = FlowRollout
    allow_biased = False  # there is no temperature to set
    exact_rng = True

    steps: Annotated[int, Field(ge=1)] = 10  # of the grid, in training
    noise_level: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7  # a
    guidance: Annotated[float, Field(allow_inf_nan=False)] = 1.0  # 1: none, and half the work
    eval_steps: Annotated[int, Field(ge=1)] = 40  # of a greedy evaluation
    length: Number | None = None  # None: all steps
    pixels: Annotated[int, Field(ge=0)] = 0  # a side of the picture; 0: the size the model was made for
    batch_images: Annotated[int, Field(ge=1)] = 64  # denoised together; guidance doubles the rows of a call
    dtype: Dtype = "auto"  # auto: as stored on a GPU, float32 on a CPU; steps are computed in float32 whatever it is
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.length is not None:
            number(self.length, "length")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        if cfg.sampler.on_policy:
            yield FLOW_GRPO
        if self.guidance != 1:
            yield GUIDANCE

    @property
    def evaluation_positions(self) -> int:
        """Pictures are finished, whatever `length` is; greedy ones take `eval_steps`."""
        return self.steps

    @property
    def computed_share(self) -> float:
        return 2.0 if self.guidance != 1 else 1.0

    def draw(self, step: int) -> Draw:
        """How the attempts of optimiser step `step` (from 0) are drawn."""
        return Draw(step, "train", self.steps if self.length is None else int(at(self.length, step)))

    @property
    def generation(self) -> Generation:
        grids = (self.steps, self.eval_steps)
        return Generation(grids=grids, noise_level=self.noise_level, guidance=self.guidance, pixels=self.pixels)

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.flow_engine import FlowSampler

        return FlowSampler.opened(self, context, services)

    @asynccontextmanager
    async def open_with(self, model: Any, context: PartContext, services: Services) -> AsyncIterator[Any]:
        """With a flow that is open already: nothing is loaded twice."""
        from reflux.samplers.flow_engine import FlowSampler

        yield FlowSampler(self, context, services, model)


def without_noise(cfg: RunConfig) -> str:
    """Why the steps of a run's attempts have no density, in words; "" where they have one, and where the sampler draws no steps."""
    if not cfg.sampler.on_policy:
        return f"sampler '{kind_of('samplers', cfg.sampler)}' gives states without noise"
    generation = cfg.sampler.generation
    return "sampler.noise_level = 0 draws no step" if generation.grids and not generation.noise_level else ""


def prompt_text(prompt: Prompt) -> str:
    """What a flow model is told: the prompt's last user message. DataError where there is none."""
    texts = [message["content"] for message in prompt.messages if message["role"] == "user"]
    if not texts:
        raise DataError(f"prompt {prompt.id} has no user message, which is what an image is drawn from")
    return texts[-1]


def sde_step(x: Value, v: Value, t: Value, dt: Value, noise_level: Value, noise: Value) -> tuple[Value, Value, Value]:
    """One Gaussian step from time t to t + dt: (x_next, mean, std).

        mean = x (1 + sigma^2/(2t) dt) + v (1 + sigma^2 (1-t)/(2t)) dt,     std = sigma sqrt(-dt),     x_next = mean + std noise

    At t = 1, where sigma has a pole, the 1 - t inside it is replaced by -dt: sigma = a / sqrt(-dt), mean = x (1 - a^2/2) + v dt, std = a.
    noise_level a = 0: x_next = mean = x + v dt, std = 0 (Euler's step).

    x, v, noise: one shape; t, dt, noise_level: floats, or broadcastable to it; std is like t. 16 bits would overflow, so they are widened
    to float32 first. ValueError: t outside (0, 1], dt >= 0, a step beyond t = 0, a negative noise level, unequal shapes.
    """
    shapes = [np.shape(x), np.shape(v), np.shape(noise)]
    if len(set(shapes)) > 1:
        raise ValueError(f"x, v and noise must have one shape, got {', '.join(str(tuple(shape)) for shape in shapes)}")
    mean, std = step_moments(x, v, t, dt, noise_level)
    return mean + std * wide(noise), mean, std


def step_moments(x: Value, v: Value, t: Value, dt: Value, noise_level: Value) -> tuple[Value, Value]:
    """(mean, std) of `sde_step`."""
    x, v = wide(x), wide(v)
    shapes = {"x": x, "v": v, "t": t, "dt": dt, "noise_level": noise_level}
    shapes = {name: tuple(np.shape(value)) for name, value in shapes.items()}
    if shapes["x"] != shapes["v"] or not all(_fits(shape, shapes["x"]) for shape in shapes.values()):
        raise ValueError(
            f"x and v must have one shape, and t, dt and noise_level be numbers or broadcast to it (t[:, None] for rows), got {shapes}"
        )
    of_x, of_v, std = step_factors(t, dt, noise_level)
    return x * of_x + v * of_v, std


def step_factors(t: Value, dt: Value, noise_level: Value) -> tuple[Value, Value, Value]:
    """(A, B, std) of the step with mean A x + B v: all that is not the state's or the model's."""
    t, dt, noise_level = wide(t), wide(dt), wide(noise_level)
    _check(t, dt, noise_level)
    gap = (1 - t) + (t == 1) * -dt  # 1 - t, and -dt at t = 1 exactly
    pull = noise_level**2 / (2 * gap)  # sigma^2 / (2t)
    return 1 + pull * dt, (1 + pull * (1 - t)) * dt, noise_level * (-dt * t / gap) ** 0.5


def step_logp(x_next: Value, mean: Value, std: Value) -> Value:
    """log N(x_next; mean, std^2), summed over the last axis: nats of a whole state. ValueError where std is 0 (the ODE has no density)."""
    x_next, mean, std = wide(x_next), wide(mean), wide(std)
    if not _all(std > 0):
        raise ValueError("a step of the ODE has no density: its std is 0. Draw with noise_level > 0.")
    z = (x_next - mean) / std
    return -(z * z / 2 + (_log(std) + 0.5 * math.log(2 * math.pi))).sum(-1)


def wide(value: Value) -> Value:
    """16-bit arrays and tensors as float32, wider ones as they are, plain numbers as floats."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, np.ndarray):
        return value.astype(np.promote_types(value.dtype, np.float32), copy=False)
    import torch

    return value.to(torch.promote_types(value.dtype, torch.float32))


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Does an array of this shape broadcast to one of shape `whole`?"""
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False))


def _check(t: Value, dt: Value, noise_level: Value) -> None:
    if not _all((t > 0) & (t <= 1)):
        raise ValueError(f"t must lie in (0, 1], 1 being noise and 0 data, got {t}")
    if not _all(dt < 0):
        raise ValueError(f"dt must be negative, for time runs from noise (t = 1) down to data (t = 0), got {dt}")
    if not _all(t + dt >= -_ROUNDING):
        raise ValueError(f"a step must end at t = 0 or before, got t = {t} with dt = {dt}")
    if not _all((noise_level >= 0) & (noise_level < math.inf)):
        raise ValueError(f"noise_level must be 0 (the ODE) or a positive number, got {noise_level}")


def _all(condition: Value) -> bool:
    return condition if isinstance(condition, bool) else bool(condition.all())


def _log(value: Value) -> Value:
    if isinstance(value, float):
        return math.log(value)
    return np.log(value) if isinstance(value, np.ndarray) else value.log()
