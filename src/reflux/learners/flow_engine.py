"""The training state of `learners.flow`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reflux.config.step_context import seed_of
from reflux.errors import ModelError
from reflux.learners.gradient_learner import GradientLearner
from reflux.learners.observe import stale
from reflux.learners.tally import unpacked
from reflux.loss import flow_loss
from reflux.loss.aggregate import Result
from reflux.loss.batch import Item, signature
from reflux.loss.flow_loss import FlowMicroBatch
from reflux.loss.term import LossTerm
from reflux.models import lora
from reflux.models.flow.adapter_files import write_adapter
from reflux.models.flow.flow_adapters import taken
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.load import load_flow
from reflux.models.flow.start import start
from reflux.models.placement import autocast
from reflux.types import Attempt, Group, Target, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.flow import Flow
    from reflux.runtime.services import Services


class FlowLearner(GradientLearner):
    """Trains a flow model on its velocities at the stored states, which are constants."""

    refusal = (
        "a step near data (small t) whose KL in nats is very large: use a larger sampler.noise_level, or "
        "scale = 'released'"
    )

    def __init__(self, cfg: Flow, context: PartContext, services: Services, model: FlowModel):
        self.cfg, self.model = cfg, model
        self._on_the_base = start(model, cfg.merge, cfg.adapter, cfg.lora, seed=seed_of(context.seed, "lora"))
        if cfg.gradient_checkpointing:
            model.net.transformer.enable_gradient_checkpointing()
        generation = context.generation
        self.macs = model.macs(generation.guidance, generation.pixels)
        super().__init__(cfg, context, services, model.net, cfg.average)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Flow, context: PartContext, services: Services) -> AsyncIterator[FlowLearner]:
        load = partial(
            load_flow,
            cfg.model,
            "learner.model",
            dtype="float32",
            device=cfg.device,
            shared_cache=services.shared,
        )
        yield cls(cfg, context, services, await services.run_model(load))

    @property
    def observes(self) -> bool:
        return self.context.requirements.now_at_behaviour

    def observed(self, groups: Sequence[Group]) -> Iterator[tuple[Attempt, Target]]:
        found = self.velocities(stale(self, groups))
        return ((attempt, VelocityTarget(teacher="now", v_TD=v_TD)) for attempt, v_TD in found)

    def whole(self, attempt: Attempt) -> Item:
        """All positions that the student chose."""
        rows_N = np.flatnonzero(attempt.rollout.mask_T)
        return Item(attempt, attempt.rollout, rows_N, np.zeros(len(rows_N), dtype=np.float32), (), ())

    def velocities(self, groups: Sequence[Group]) -> Iterator[tuple[Attempt, np.ndarray]]:
        """(attempt, v_TD): the current student's velocity at every chosen position, NaN at the others; no
        gradient.
        """
        whole = [
            self.whole(attempt) for group in groups for attempt in group if attempt.rollout.finish != "error"
        ]
        for alike in _alike([item for item in whole if len(item.rows_N)]):
            batches = (
                FlowMicroBatch(piece, (), self.model.device)
                for piece in flow_loss.pieces(alike, self.cfg.micro_batch)
            )
            with torch.no_grad():
                v_ND = torch.cat([self._velocity(batch) for batch in batches])
            yield from ((item.attempt, v_TD) for item, v_TD in unpacked(alike, v_ND))

    def micro_batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        for alike in _alike(items):
            yield from flow_loss.pieces(alike, self.cfg.micro_batch)

    def shrink(self, items: Sequence[Item]) -> None:
        raise ModelError(
            f"learner.micro_batch = {self.cfg.micro_batch} does not fit into the memory of the device. Lower "
            "it, or set learner.gradient_checkpointing = true."
        )

    def backward(self, part: list[Item], objectives: Sequence[LossTerm], log_variance: bool) -> Result:
        batch = FlowMicroBatch(part, objectives, self.model.device)
        return flow_loss.backward(batch, self._velocity(batch))

    def _velocity(self, batch: FlowMicroBatch) -> Tensor:
        with autocast(self.cfg.autocast, self.model.device):
            return self.model.velocity(batch.x_ND, batch.t_N, batch.texts, batch.guidance)

    def export(self, folder: Path) -> None:
        """Write the student as a diffusers folder, with LoRA adapters merged into the weights. If an average
        is kept, the average is written.

        If an adapter was trained on the unchanged model, it is also written as a separate file in the format
        that diffusers' `load_lora_weights` reads.
        """
        with self.at_mean():
            self.model.save(folder, weights=lora.merged(self.net))
            # After an extrapolation jump the base may have changed, and the adapter alone is not enough.
            if self._on_the_base and not self.access.written:
                write_adapter(taken(self.model.net.transformer), folder)


def _alike(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Groups of items whose rows may share a micro-batch."""
    found: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        rollout = flow_loss.flow_of(item)
        found.setdefault((*signature(item), rollout.guidance, rollout.noise_level > 0), []).append(item)
    yield from found.values()
