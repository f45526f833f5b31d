"""A sampler around another one: it makes the training attempts, and the other samples in evaluations."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from reflux.config.context import Generation
from reflux.config.step_context import SamplingParams
from reflux.samplers.base import Sampler, SamplerPart

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.samplers.base import OpenSampler


class WrappingSampler(SamplerPart, Protocol):
    """The members that a wrapping sampler takes from the sampler in its field `generate`."""

    generate: Any

    @property
    def _inner(self) -> Sampler:
        return self.generate

    def draw(self, step: int) -> SamplingParams:
        """As the inner sampler, with temperature 1 and top-p 1, because the student does not sample."""
        return replace(self._inner.draw(step), temperature=1.0, top_p=1.0)

    @property
    def evaluation_positions(self) -> int:
        return self._inner.evaluation_positions

    @property
    def generation(self) -> Generation:
        return self._inner.generation

    @property
    def allow_biased(self) -> bool:
        """False: the student does not sample the training attempts, so no temperature applies to them."""
        return False

    @property
    def precision(self) -> str:
        return self._inner.precision

    @property
    def cache_tokens(self) -> int:
        return self._inner.cache_tokens

    @property
    def server_memory(self) -> str:
        return self._inner.server_memory

    def decoding(self, opened: Any) -> tuple[bool, str] | None:
        return self._inner.decoding(opened.inner)

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps

    @property
    def exact_rng(self) -> bool:
        return self._inner.exact_rng

    def open_with(
        self, model: Any, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenSampler]:
        return self._inner.open_with(model, context, services)
