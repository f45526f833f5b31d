"""The model behind `teachers.local`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reflux.models import Model, load_model, load_tokenizer
from reflux.teachers.in_process import InProcess
from reflux.tokens import check_same_tokens

if TYPE_CHECKING:
    from reflux.rundir import Run
    from reflux.teachers.local import Local


class LocalTeacher(InProcess):
    """Frozen: it follows nobody and has no state."""

    def __init__(self, cfg: Local, run: Run, name: str, model: Model):
        super().__init__(cfg, run, name, model, model.renderer(cfg.system, cfg.template))

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Local, run: Run, name: str) -> AsyncIterator[LocalTeacher]:
        where = f"teachers.{name}.model"
        tokenizer = await run.off_loop(load_tokenizer, cfg.model, where, cfg.trust_remote_code)
        check_same_tokens(run.tokenizer, tokenizer, name)
        model = await run.off_loop(
            partial(
                load_model,
                cfg.model,
                where,
                dtype=cfg.dtype,
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=cfg.trust_remote_code,
                device_map=cfg.device_map,
            )
        )
        with closing(cls(cfg, run, name, model)) as teacher:
            yield teacher

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Frozen."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Frozen: nothing was saved."""
