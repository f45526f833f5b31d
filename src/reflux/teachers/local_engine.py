"""The model of `teachers.local`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reflux.models.chat.token_map import check_same_tokens
from reflux.models.parking import Parked, to_device
from reflux.models.text import Model, load_model, load_tokenizer
from reflux.teachers.in_process_teacher import InProcessTeacher

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.local import Local


class LocalTeacher(InProcessTeacher):
    """A frozen model without state."""

    def __init__(
        self, cfg: Local, context: PartContext, services: Services, model: Model, *, frozen: bool = True
    ):
        super().__init__(
            cfg,
            context,
            services,
            model,
            model.renderer(cfg.system, cfg.template, context.student.prompt_suffix),
            frozen=frozen,
        )
        self.parked = self._parked() if cfg.offload else None

    def _parked(self) -> Parked | None:
        """The parked weights; None on a CPU, where the weights are already."""
        device = self.model.device
        if device.type == "cpu":
            self.services.listener.noted(
                f"teachers.{self.context.name}.offload has no effect, because the teacher is on the CPU"
            )
            return None
        net = self.model.net
        return Parked(net, list(net.get_output_embeddings().parameters()), to_device(device))

    def here(self) -> AbstractContextManager[None]:
        return nullcontext() if self.parked is None else self.parked.here()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: Local, context: PartContext, services: Services
    ) -> AsyncIterator[LocalTeacher]:
        where = f"teachers.{context.name}.model"
        tokenizer = await services.run_model(
            load_tokenizer, cfg.model, where, cfg.trust_remote_code, cfg.base_model
        )
        check_same_tokens(services.tokenizer, tokenizer, context.name)
        model = await services.run_model(
            partial(
                load_model,
                cfg.model,
                where,
                dtype=cfg.dtype,
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=cfg.trust_remote_code,
                device_map=cfg.device_map,
                base=cfg.base_model,
            )
        )
        services.tell(model.notes)
        with closing(cls(cfg, context, services, model)) as teacher:
            yield teacher

    async def publish(self, weights: Weights, step: int) -> None:
        """Does nothing: the teacher is frozen."""

    def save(self, folder: Path) -> None:
        """Writes nothing: the teacher is frozen and is loaded from its model again."""

    def load(self, folder: Path) -> None:
        """Reads nothing: `save` wrote nothing."""
