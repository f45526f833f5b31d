"""The model of `teachers.self_teacher`: a copy of the student that gets every new version of the weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reflux.models.chat.renderer import Renderer
from reflux.models.text import Model, load_model
from reflux.storage import checkpoints
from reflux.teachers.in_process_teacher import InProcessTeacher

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.self_teacher import SelfTeacher

PHI = "phi/"


class SelfTeacherEngine(InProcessTeacher):
    """Holds phi, the teacher's weights, in float32. `version` is the version of the last student weights that
    `publish` got; None before the first call.
    """

    def __init__(
        self, cfg: SelfTeacher, context: PartContext, services: Services, model: Model, renderer: Renderer
    ):
        # `precision` reads it
        self.cfg = cfg
        super().__init__(cfg, context, services, model, renderer)
        self.version: int | None = None

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: SelfTeacher, context: PartContext, services: Services
    ) -> AsyncIterator[SelfTeacherEngine]:
        student = context.student
        model = await services.run_model(
            partial(
                load_model,
                student.model,
                "learner.model",
                dtype="float32",
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=student.trust_remote_code,
                base=student.base_model,
            )
        )
        renderer = model.renderer(student.system, student.template, student.prompt_suffix)
        with closing(cls(cfg, context, services, model, renderer)) as teacher:
            yield teacher

    @property
    def autocast(self) -> str:
        return self.cfg.autocast

    async def publish(self, weights: Weights, step: int) -> None:
        """Update phi as the key `follow` of the teacher's table sets. Under "ema", the same version a second
        time leaves phi unchanged.
        """
        await self.services.run_model(self._publish, weights, step)

    def _publish(self, weights: Weights, step: int) -> None:
        share = self._share(weights.version, step)
        self.version = weights.version
        parameters = dict(self._parameters())
        with torch.no_grad():
            for name, value in weights.tensors():
                if name in parameters:
                    move(parameters[name], value, share)

    def _share(self, version: int, step: int) -> float:
        """The share of the new weights in phi: 1 copies them, 0 leaves phi unchanged."""
        if self.cfg.follow == "live" or self.version is None:
            return 1.0
        if self.cfg.follow == "ema":
            return 0.0 if version == self.version else self.cfg.ema
        return float(step <= self.cfg.step)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, under the first of its names, because a matrix that two layers share must be
        updated only once.
        """
        seen: set[int] = set()
        for name, own in self.model.net.state_dict().items():
            if own.data_ptr() not in seen:
                seen.add(own.data_ptr())
                yield name, own

    def save(self, folder: Path) -> None:
        """Write phi by name, and the last version it got. Under "live" nothing is written, because phi is the
        student.
        """
        if self.cfg.follow != "live":
            checkpoints.write(
                folder, {"version": self.version, **{f"{PHI}{name}": own for name, own in self._parameters()}}
            )

    def load(self, folder: Path) -> None:
        if self.cfg.follow == "live":
            return
        state = checkpoints.read(folder)
        self.version = state["version"]
        with torch.no_grad():
            for name, own in self._parameters():
                own.copy_(state[f"{PHI}{name}"])


def move(own: Tensor, student: Tensor, share: float) -> None:
    """own <- (1 - share) own + share student, in place and in own's type, for a tensor of phi (`own`) and the
    same tensor of the student. The result is exact to the bit at share 0, at share 1 and where the two are
    equal.
    """
    if share == 1 or not own.is_floating_point():
        own.copy_(student)
    elif share:
        own.lerp_(student.to(own), share)
