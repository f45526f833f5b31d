"""A rank other than rank 0: it does what rank 0 sends, until the run ends."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from reflux.errors import StepRefused
from reflux.learners.hf_engine import HFLearner, load_student
from reflux.learners.rank_group import RankGroup, ignore_signals
from reflux.learners.shards import Shards
from reflux.models.torch_settings import prepare_torch
from reflux.runtime.library_logging import quiet_libraries
from reflux.runtime.services import Services

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.fsdp import FSDP


def follow(cfg: FSDP) -> None:
    """Wait for the part and the context that rank 0 opens, open the same, and run what it sends. An error
    that rank 0 does not have ends this process, and so the run.
    """
    ignore_signals()
    quiet_libraries()
    group = RankGroup.join(cfg.device)
    opening = group.receive()
    if opening is not None:
        part, context = opening
        prepare_torch(context.placement.threads, context.placement.deterministic)
        services = Services(context.student)
        learner = one_rank(part, context, services, group)
        while (order := group.receive()) is not None:
            work, arguments = order
            # Rank 0 refuses the same step, and says so.
            with suppress(StepRefused):
                work(learner, *arguments)
            learner.ranks.rest()
        services.close()
    group.leave()


def one_rank(cfg: FSDP, context: PartContext, services: Services, group: RankGroup) -> HFLearner:
    """The learner of this rank. It is loaded on the CPU, because the whole model may not fit on one GPU."""
    moves = None if group.device.type == "cpu" else "cpu"
    return HFLearner(cfg, context, services, load_student(cfg, services, moves), Shards(group))
