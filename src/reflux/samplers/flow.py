"""The flow sampler: an image is sampled in `steps` Gaussian steps from noise (t = 1) to data (t = 0).

x_t = (1 - t) x_0 + t x_1 with x_1 standard normal. The velocity v estimates x_1 - x_0. The marginals are the
same at every noise level a:

    dx = [ v + sigma^2 / (2t) (x + (1 - t) v) ] dt + sigma dw,   sigma(t) = a sqrt(t / (1 - t)),   dt < 0

(arXiv 2605.08063; Flow-GRPO, arXiv 2505.05470). One Euler-Maruyama step is `sde_step`; a = 0 is the ODE.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.context import Generation
from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError
from reflux.models.placement import Device, Dtype
from reflux.samplers.base import SamplerPart
from reflux.types import FlowRollout, Prompt, Rollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


FLOW_GRPO = Paper(
    "flow_grpo",
    "Flow-GRPO: Training Flow Matching Models via Online RL",
    "2505.05470",
    2025,
    "Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and others",
)
GUIDANCE = Paper(
    "guidance", "Classifier-Free Diffusion Guidance", "2207.12598", 2022, "Ho, Jonathan and Salimans, Tim"
)


@dataclass(frozen=True, config=STRICT)
class Flow(SamplerPart):
    """Samples batches of images with a flow model in this process. Each image has its own random numbers.

    The noise depends only on (run seed, purpose, step, prompt, sample, denoising step). The other images in a
    batch therefore never change the random numbers of an image. Training attempts, and all other attempts at
    a temperature above 0, are sampled by the SDE at `noise_level` in `steps` steps. Greedy attempts
    (temperature 0) are sampled by the ODE in `eval_steps` steps, and only their first noise is random. Of
    greedy attempts only the image is kept and no states, because the states are large and are not trained on.

    `max_denoising_steps`: in training only this many steps of the grid are computed (prefix by generation),
    and the image is the state reached. Evaluations compute all steps. With guidance g the velocity is
    v_uncond + g (v_cond - v_uncond); teachers and the learner use the same guidance.
    """

    on_policy: ClassVar[bool] = True
    rollouts: ClassVar[type[Rollout]] = FlowRollout
    # A flow sampler has no temperature setting for training.
    allow_biased = False
    exact_rng = True

    # Denoising steps of the grid, in training.
    steps: Annotated[int, Field(ge=1)] = 10
    # The noise level a of the SDE.
    noise_level: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    # 1: no guidance, at half the cost.
    guidance: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    # Denoising steps of a greedy evaluation.
    eval_steps: Annotated[int, Field(ge=1)] = 40
    # Largest number of denoising steps in training; None: all steps.
    max_denoising_steps: Number | None = None
    # Side of the image in pixels; 0: the size the model was trained for.
    pixels: Annotated[int, Field(ge=0)] = 0
    # Images denoised together. Guidance doubles the rows of a call.
    batch_images: Annotated[int, Field(ge=1)] = 64
    # "auto": as stored on a GPU, float32 on a CPU. Steps are always computed in float32.
    dtype: Dtype = "auto"
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.max_denoising_steps is not None:
            number(self.max_denoising_steps, "max_denoising_steps")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        if cfg.sampler.on_policy:
            yield FLOW_GRPO
        if self.guidance != 1:
            yield GUIDANCE

    @property
    def evaluation_positions(self) -> int:
        """Evaluation images are denoised completely, whatever `max_denoising_steps` is. Greedy ones take
        `eval_steps`.
        """
        return self.steps

    @property
    def computed_share(self) -> float:
        return 2.0 if self.guidance != 1 else 1.0

    def draw(self, step: int) -> SamplingParams:
        """How the attempts of optimiser step `step` (from 0) are sampled."""
        return SamplingParams(
            step,
            "train",
            self.steps if self.max_denoising_steps is None else int(at(self.max_denoising_steps, step)),
        )

    @property
    def generation(self) -> Generation:
        grids = (self.steps, self.eval_steps)
        return Generation(
            grids=grids, noise_level=self.noise_level, guidance=self.guidance, pixels=self.pixels
        )

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.flow_engine import FlowSampler

        return FlowSampler.opened(self, context, services)

    @asynccontextmanager
    async def open_with(self, model: Any, context: PartContext, services: Services) -> AsyncIterator[Any]:
        """Sample with `model`, a flow model that is already open, so that nothing is loaded twice."""
        from reflux.samplers.flow_engine import FlowSampler

        yield FlowSampler(self, context, services, model)


def without_noise(cfg: RunConfig) -> str:
    """The reason, in words, why the steps of a run's attempts have no density. It is "" if they have one, or
    if the sampler samples no denoising steps.
    """
    if not cfg.sampler.on_policy:
        return f"sampler '{kind_of('samplers', cfg.sampler)}' gives states without noise"
    generation = cfg.sampler.generation
    return (
        "sampler.noise_level = 0 makes the denoising steps deterministic"
        if generation.grids and not generation.noise_level
        else ""
    )


def prompt_text(prompt: Prompt) -> str:
    """The text that a flow model gets: the prompt's last user message. DataError if there is none."""
    texts = [message["content"] for message in prompt.messages if message["role"] == "user"]
    if not texts:
        raise DataError(
            f"prompt {prompt.id} has no user message. The last user message is the text that an image is "
            "sampled for"
        )
    return texts[-1]
