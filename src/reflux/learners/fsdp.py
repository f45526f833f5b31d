"""A language model whose weights, gradients and Adam moments are divided among several processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.learners.hf import HF

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class FSDP(HF):
    """As `hf`, with weights, gradients and Adam moments divided among the processes that torchrun starts, or
    a cluster with `learner_ranks` (FSDP2). Without either it is one process.

        torchrun --nproc-per-node 2 -m reflux.cli.main run RECIPE.toml

    Rank 0 runs the loop, with the sampler, the teachers and all files. The other ranks take part in the
    student's passes. Whole groups of attempts are shared out; the gradient is that of one process. Master
    weights, their sums of gradients and the moments are float32. On a GPU each layer is gathered in bfloat16.
    `micro_batch_tokens = "auto"` is a fixed number here, because no rank can try a micro-batch alone.
    `device` is the type of device; each rank takes the GPU of its local rank. A checkpoint resumes on any
    number of ranks. All ranks need the run directory on a file system that they share.
    """

    instead_of: ClassVar[str] = "hf"
    divides: ClassVar[bool] = True

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from super().refusals(where, cfg)
        if self.compile:
            yield (
                f"{where}.compile was not tested with layers that are divided among ranks. Leave it out, or "
                f'use {where}.kind = "hf".'
            )

    def follow(self) -> bool:
        # torchrun sets it. Rank 0 leads.
        if os.environ.get("RANK", "0") == "0":
            return False
        from reflux.learners.follower import follow

        follow(self)
        return True

    def dismiss(self) -> None:
        from reflux.learners.rank_group import RankGroup

        RankGroup.join(self.device).leave()

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.learners.fsdp_engine import FSDPLearner

        return FSDPLearner.opened(self, context, services)
