"""The training state of `learners.hf`, and of one rank of `learners.fsdp`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reflux.config.step_context import seed_of
from reflux.errors import ModelError
from reflux.learners.gradient_learner import GradientLearner
from reflux.learners.ranks import Alone, Ranks
from reflux.loss import token_loss
from reflux.loss.aggregate import Result, no_rows
from reflux.loss.batch import Item, micro_batches
from reflux.loss.term import LossTerm
from reflux.models import lora
from reflux.models.compiled import compile_layers
from reflux.models.device_memory import memory_of
from reflux.models.packed_attention import attending_packed, why_padded
from reflux.models.parameters import parameter_count
from reflux.models.placement import autocast, autocasts
from reflux.models.savable import check_savable, mend_generation_config
from reflux.models.text import Model, load_model
from reflux.models.text_rows import packed, padded
from reflux.models.token_budget import FIRST, FIXED, TokenBudget, busy_tokens
from reflux.models.training_mode import quiet_dropout, recompute_activations
from reflux.types import Attempt, Group, Target

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.hf import HF
    from reflux.runtime.services import Services


_TOKENS, _SETTLED = "micro_batch_tokens", "micro_batch_settled"


class HFLearner(GradientLearner):
    """Trains a language model. The trunk (the model without its output head) computes the hidden states at
    the positions with a non-zero weight. The output head (the matrix that maps hidden states to logits) is
    applied together with the loss.
    """

    refusal = (
        "a teacher that gives probability 0 to a token that the student may sample (forward and reverse KL "
        "are then infinite: use divergence = 'jsd')"
    )

    def __init__(
        self, cfg: HF, context: PartContext, services: Services, model: Model, ranks: Ranks | None = None
    ):
        self.cfg, self.model = cfg, model
        ranks = ranks or Alone()
        self.macs = parameter_count(model.net)
        quiet_dropout(model.net)
        if cfg.lora:
            lora.attach(model, cfg.lora, seed=seed_of(context.seed, "lora"))
        if cfg.gradient_checkpointing:
            recompute_activations(model.net)
        if cfg.compile:
            services.listener.noted(f"{compile_layers(model.net)} layers are compiled in the first steps")
        ranks.divide(model, autocasts(cfg.autocast, model.device))
        super().__init__(cfg, context, services, model.net, ranks=ranks)
        self.budget = self._budget()
        # The trial of packed rows reads texts.
        ranks.gather()
        # "" where rows are packed, else the reason for padding
        self.padded_because = why_padded(model, self.autocast())
        ranks.rest()

    @property
    def packs(self) -> bool:
        return not self.padded_because

    def _budget(self) -> TokenBudget:
        """The tokens of a micro-batch. They are measured where that is faster and need not repeat exactly."""
        asked, device, note = self.cfg.micro_batch_tokens, self.model.device, self.services.listener.noted
        key = f"learner.{_TOKENS}"
        if asked != "auto":
            return TokenBudget(key, note, asked)
        if device.type == "cpu":
            return TokenBudget(key, note, FIXED)
        most = busy_tokens(self.model.net.get_input_embeddings().weight.shape[-1])
        # Ranks cannot begin a batch again when one of them has exceeded its memory, so nothing is tried.
        exact = torch.are_deterministic_algorithms_enabled() or self.ranks.shared
        return (
            TokenBudget(key, note, most) if exact else TokenBudget(key, note, FIRST, most, memory_of(device))
        )

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: HF, context: PartContext, services: Services) -> AsyncIterator[HFLearner]:
        yield cls(cfg, context, services, await services.run_model(load_student, cfg, services))

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
        return micro_batches(items, lambda: self.budget.tokens, self.packs)

    def shrink(self, items: Sequence[Item]) -> None:
        if self.ranks.shared:
            raise ModelError(
                "a micro-batch does not fit into the memory of the device. Lower learner.micro_batch_tokens "
                f"(now {self.budget.tokens:,}), or set learner.gradient_checkpointing = true."
            )
        if not self.budget.halve(max(item.input_tokens for item in items)):
            raise ModelError(
                "one text alone does not fit into the memory of the device in the backward pass. Set "
                "learner.gradient_checkpointing = true, or lower sampler.max_tokens."
            )

    def batch(self, part: list[Item], objectives: Sequence[LossTerm] = ()) -> token_loss.TokenMicroBatch:
        return token_loss.TokenMicroBatch(
            part, objectives, self.model.device, self.services.heads, pack=self.packs
        )

    def backward(self, part: list[Item], objectives: Sequence[LossTerm], log_variance: bool) -> Result:
        if not part:
            return self.idle()
        batch = self.batch(part, objectives)
        with self.budget.measuring(batch.texts.ids_BL.numel()), self.passing():
            return token_loss.backward(batch, self.hidden_rows(batch), self.model.head, log_variance)

    def hidden_rows(self, batch: token_loss.TokenMicroBatch) -> Tensor:
        """h_NH: the trunk's hidden states that predict the positions which count in the loss (those with a
        non-zero weight).
        """
        return self.ranks.states(self.model, batch.texts, batch.rows_N)

    def idle(self) -> Result:
        """A pass over one token, with a gradient of 0 where gradients are computed. A rank makes it where
        another rank has one more micro-batch, because ranks gather the weights together.
        """
        text, device = np.zeros(1, dtype=np.int64), self.model.device
        texts = packed([text], device) if self.packs else padded([text], device)
        with self.passing():
            h_1H = self.ranks.states(self.model, texts, torch.zeros(1, dtype=torch.int64, device=device))
            loss = (self.model.head.logits(h_1H).float() * 0).sum()
            if loss.requires_grad:
                loss.backward()
        return no_rows(loss.detach())

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The context of the passes over micro-batches, the backward pass included. The output head is whole
        in it, and afterwards until the next backward pass.
        """
        self.ranks.gather()
        with self.autocast(), attending_packed(self.model.net) if self.packs else nullcontext():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.cfg.autocast, self.model.device)

    def state(self) -> dict[str, Any]:
        """Also the measured size of micro-batches, so that a resumed run cuts its batches as before."""
        budget = self.budget
        measured = {} if budget.memory is None else {_TOKENS: budget.tokens, _SETTLED: budget.settled}
        return super().state() | measured

    def take_up(self, state: Mapping[str, Any]) -> None:
        super().take_up(state)
        if self.budget.memory is not None and _TOKENS in state:
            self.budget.tokens, self.budget.settled = state[_TOKENS], state[_SETTLED]

    def export(self, folder: Path) -> None:
        lora.export(self.model, folder, writes=self.ranks.leads)


def load_student(cfg: HF, services: Services, device: str | None = None) -> Model:
    """Load the model of a learner. device: where it is loaded, if it is moved later; None: `cfg.device`.
    ModelError if it could not be saved after training.
    """
    model = load_model(
        cfg.model,
        "learner.model",
        dtype="float32",
        device=device or cfg.device,
        attention=cfg.attention,
        trust_remote_code=cfg.trust_remote_code,
        base=cfg.base_model,
        moves=device is not None,
    )
    services.tell(model.notes)
    if mended := mend_generation_config(model.net):
        services.listener.noted(mended)
    check_savable(model)
    return model
