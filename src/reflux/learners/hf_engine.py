"""The training state of `learners.hf`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reflux.config.step_context import seed_of
from reflux.learners.gradient_learner import GradientLearner
from reflux.loss import token_loss
from reflux.loss.aggregate import Result
from reflux.loss.batch import Item, micro_batches
from reflux.loss.term import LossTerm
from reflux.models import lora
from reflux.models.savable import check_savable, mend_generation_config
from reflux.models.text import Model, load_model, parameter_count
from reflux.models.training_mode import quiet_dropout, recompute_activations
from reflux.types import Attempt, Group, Target

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.hf import HF
    from reflux.runtime.services import Services


class HFLearner(GradientLearner):
    """Trains a language model. The trunk (the model without its output head) computes the hidden states at
    the positions with a non-zero weight. The output head (the matrix that maps hidden states to logits) is
    applied together with the loss.
    """

    refusal = (
        "a teacher that gives probability 0 to a token that the student may sample (forward and reverse KL "
        "are then infinite: use divergence = 'jsd')"
    )

    def __init__(self, cfg: HF, context: PartContext, services: Services, model: Model):
        self.cfg, self.model = cfg, model
        self.macs = parameter_count(model.net)
        quiet_dropout(model.net)
        if cfg.lora:
            lora.attach(model, cfg.lora, seed=seed_of(context.seed, "lora"))
        if cfg.gradient_checkpointing:
            recompute_activations(model.net)
        super().__init__(cfg, context, services, model.net)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: HF, context: PartContext, services: Services) -> AsyncIterator[HFLearner]:
        model = await services.run_model(
            partial(
                load_model,
                cfg.model,
                "learner.model",
                dtype="float32",
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=cfg.trust_remote_code,
                base=cfg.base_model,
            )
        )
        services.tell(model.notes)
        if mended := mend_generation_config(model.net):
            services.listener.noted(mended)
        check_savable(model)
        yield cls(cfg, context, services, model)

    @property
    def observes(self) -> bool:
        return self.context.requirements.now_at_behaviour or bool(self.context.requirements.now_topk)

    def observed(self, groups: Sequence[Group]) -> Iterator[tuple[Attempt, Target]]:
        from reflux.learners.observe import observed

        return observed(self, groups)

    def whole(self, attempt: Attempt) -> Item:
        """An Item with all positions of this attempt and no objectives, for forward passes without a loss.
        Positions of tokens that the student did not sample, such as an environment's, are included, because
        the forward pass computes them too.
        """
        rollout = attempt.rollout
        return Item(
            attempt, rollout, np.arange(rollout.length), np.zeros(rollout.length, dtype=np.float32), (), ()
        )

    def micro_batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        return micro_batches(items, self.cfg.micro_batch_tokens)

    def backward(self, part: list[Item], objectives: Sequence[LossTerm], log_variance: bool) -> Result:
        batch = token_loss.TokenMicroBatch(part, objectives, self.model.device, self.services.heads)
        with self.autocast():
            return token_loss.backward(batch, self.hidden_rows(batch), self.model.head, log_variance)

    def hidden_rows(self, batch: token_loss.TokenMicroBatch) -> Tensor:
        """h_NH: the trunk's hidden states that predict the positions which count in the loss (those with a
        non-zero weight). No attention mask is needed, because right padding comes after all real tokens and
        attention is causal.
        """
        h_BLH = self.model.trunk(input_ids=batch.ids_BL, use_cache=False).last_hidden_state
        return h_BLH.flatten(0, 1)[batch.rows_N]

    def autocast(self) -> AbstractContextManager[Any]:
        wanted = self.cfg.autocast == "auto" and self.model.device.type == "cuda"
        return torch.autocast("cuda", dtype=torch.bfloat16) if wanted else nullcontext()

    def export(self, folder: Path) -> None:
        lora.export(self.model, folder)
