"""Common base of the learners: AdamW on float32 master weights, and an optional average of these weights.

Several processes may share the weights (`ranks.py`). Every method that computes with them is then called in
all processes at the same time.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from reflux.config.schedules import at
from reflux.errors import StepRefused
from reflux.learners.optimised import Optimised
from reflux.learners.ranks import Alone, Ranks
from reflux.learners.tally import Learned, Tally, learned
from reflux.loss.aggregate import Result
from reflux.loss.batch import Item, plan
from reflux.loss.step import StepRequest, StepResult
from reflux.loss.term import LossTerm
from reflux.metrics.values import Max, Stats, Sum
from reflux.models import lora
from reflux.models.dtensors import gathered
from reflux.models.net_access import NetAccess
from reflux.models.optimiser_state import optimiser_state, restore_optimiser
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.types import Attempt, Group, StepRecord, Target

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.models.settings import Average
    from reflux.runtime.services import Services

Done = TypeVar("Done")


class GradientLearner(ABC):
    """Owns the float32 master weights and the optimiser. A subclass defines how a batch is divided into
    micro-batches and computes the gradient of one micro-batch.
    """

    # The usual causes of a loss that is not finite, as a phrase for the error message.
    refusal: str

    def __init__(
        self,
        cfg: Optimised,
        context: PartContext,
        services: Services,
        net: nn.Module,
        average: Average | None = None,
        ranks: Ranks | None = None,
    ):
        """Train the parameters of `net` that require a gradient. average: the settings of an average of the
        weights; None: no average is kept. ranks: the processes that share the weights; None: only this one.
        """
        self.settings, self.context, self.services = cfg, context, services
        self.ranks = ranks or Alone()
        self.net, self.average = net, average
        # `updates` counts optimiser steps; `version` also counts extrapolation jumps.
        self.version = self.updates = 0
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.trained.items()} if average else {}
        # Positions that `observe` ran forward since the last step.
        self._observed = 0
        self.access = NetAccess(net, self.trained.values())
        self.optimiser = torch.optim.AdamW(
            list(self.trained.values()),
            lr=0.0,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    @property
    @abstractmethod
    def observes(self) -> bool:
        """True if a part requires the current student's outputs."""

    @abstractmethod
    def observed(self, groups: Sequence[Group]) -> Iterator[tuple[Attempt, Target]]:
        """The current student's outputs at each attempt's positions, without a gradient. Attempts without
        outputs are left out.
        """

    @abstractmethod
    def whole(self, attempt: Attempt) -> Item:
        """An item with all positions of an attempt at which `observed` computes outputs, whatever their
        weights.
        """

    @abstractmethod
    def micro_batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Divide the items into parts that fit one forward and backward pass. The rows of one item may be
        spread over several parts.
        """

    @abstractmethod
    def shrink(self, items: Sequence[Item]) -> None:
        """Make micro-batches smaller, after one of these items exceeded the memory. ModelError with the
        remedy if they cannot be smaller.
        """

    @abstractmethod
    def backward(self, part: list[Item], objectives: Sequence[LossTerm], log_variance: bool) -> Result:
        """Compute the loss of one micro-batch and run its backward pass. Gradients are added to those of the
        parameters. log_variance: True if the variance of the sampled gradient is computed too. part: empty
        where another rank has more micro-batches; the loss is then 0.
        """

    def everywhere(self, work: Callable[..., Done], *arguments: Any) -> Done:
        """The result of work(learner, *arguments). Where several processes share the weights, each of them
        runs it, and this is the result of the process that runs the loop.
        """
        return work(self, *arguments)

    def publish(self) -> InMemory:
        config = lora.adapter_config(self.net)
        adapter = None if config is None else AdapterWeights(config, lambda: lora.adapter_tensors(self.net))
        return InMemory(self.version, lambda: lora.full_weights(self.net), adapter=adapter)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return lora.merged(self.net)

    @contextmanager
    def at_mean(self) -> Iterator[bool]:
        live = (
            {name: parameter.detach().clone() for name, parameter in self.trained.items()}
            if self.average
            else {}
        )
        self._put(self.mean)
        try:
            yield self.average is not None
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)

    async def observe(self, groups: Sequence[Group]) -> list[Target | None]:
        attempts = [attempt for group in groups for attempt in group]
        with self.services.clock.span("learner", "observe"):
            found = await self.services.run_model(self.seen, groups) if self.observes else {}
        return [found.get(id(attempt)) for attempt in attempts]

    def seen(self, groups: Sequence[Group]) -> dict[int, Target]:
        """The current student's outputs by the id() of the attempt."""
        found: dict[int, Target] = {}
        for attempt, target in self.observed(groups):
            found[id(attempt)] = target
            self._observed += self.whole(attempt).positions
        return found

    async def step(self, request: StepRequest) -> StepResult:
        return await self.services.run_model(self._step, request)

    def _step(self, request: StepRequest) -> StepResult:
        return self.learn(request, range(len(request.attempts)), len(request.attempts))

    def learn(self, request: StepRequest, places: Sequence[int], attempts: int) -> StepResult:
        """Make one optimiser step together with the other ranks. request: the share of this rank. places: the
        index of each of its attempts in the whole batch. attempts: the number of attempts of the whole batch.
        """
        started = time.perf_counter()
        items = plan(request.groups, request.objectives, request.loss_aggregation, self.ranks.counts)
        done = self.ranks.together(self._learned(request, items, places))
        stats, records = learned(done, attempts, request.log_variance)
        if "loss" in stats:
            stats |= self._move(request.step_context.step, float(stats["loss"].value or 0.0), records)
        self.services.clock.spent("learner", "learn", started, step=request.step_context.step + 1)
        return StepResult(
            stats, records, sum(each.forward for each in done), sum(each.backward for each in done)
        )

    def _learned(self, request: StepRequest, items: list[Item], places: Sequence[int]) -> Learned:
        """Accumulate the gradient of this rank's items, unless no rank has any."""
        stats: Stats = {"tokens_trained": Sum(sum(len(item.rows_N) for item in items))}
        records: list[StepRecord | None] = [None] * len(places)
        if any(self.ranks.together(bool(items))):
            self.optimiser.zero_grad(set_to_none=True)
            tally = self.gradients(items, request.objectives, request.log_variance)
            records = tally.records(request.attempts)
            stats |= tally.stats()
        backward = sum(item.positions for item in items)
        forward, self._observed = (
            self._observed + backward * (2 if self.settings.gradient_checkpointing else 1),
            0,
        )
        return Learned(stats, dict(zip(places, records, strict=True)), forward, backward)

    def _move(self, step: int, loss: float, records: list[StepRecord | None]) -> Stats:
        """Make the optimiser step along the accumulated gradient. StepRefused, with the records, if the loss
        or the gradient norm is not finite.
        """
        lr = at(self.settings.lr, step)
        norm = float(gathered(nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip)))
        if not (np.isfinite(norm) and np.isfinite(loss)):
            self.optimiser.zero_grad(set_to_none=True)
            raise StepRefused(
                f"step {step + 1}: the loss is {loss} and its gradient norm is {norm}. Both must be finite, "
                "so the optimiser step was not made, and no weight has changed. Usual "
                f"reasons: a learning rate that is too high (now {lr:g}), or {self.refusal}.",
                f"loss {loss}, gradient norm {norm}",
                records,
            )
        moves = norm > self.settings.min_grad_norm
        if moves:
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.version += 1
            self.updates += 1
            self._follow()
        return {"grad_norm": Max(norm), "lr": Max(lr), "updates": Sum(float(moves))}

    def gradients(
        self, items: list[Item], objectives: Sequence[LossTerm], log_variance: bool = False
    ) -> Tally:
        """Accumulate the gradient of the whole batch, one micro-batch after another. The arguments are those
        of `backward`, with all items of the batch.
        """
        while (tally := self._accumulated(items, objectives, log_variance)) is None:
            # An interrupted pass may have added a part of its gradient, so the whole batch begins again.
            self.optimiser.zero_grad(set_to_none=True)
            self.shrink(items)
        self.ranks.add_up(self.trained.values())
        return tally

    def _accumulated(
        self, items: list[Item], objectives: Sequence[LossTerm], log_variance: bool
    ) -> Tally | None:
        """As `gradients`; None if the memory of the device was exceeded."""
        tally = Tally()
        try:
            for part in self.ranks.passes(self.micro_batches(items)):
                tally.add(part, self.backward(part, objectives, log_variance))
        except torch.OutOfMemoryError:
            return None
        return tally

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the current weights, once every `average.every` optimiser steps."""
        if self.average is not None and self.updates % self.average.every == 0:
            for name, mean in self.mean.items():
                mean.lerp_(self.trained[name], 1 - self.average.decay)

    def save(self, folder: Path) -> None:
        self.ranks.save(folder, self.state())

    def load(self, folder: Path) -> None:
        self.take_up(self.ranks.load(folder, lora.base_parameters(self.net) | self.trained))

    def state(self) -> dict[str, Any]:
        """Trained weights, their average and Adam's moments by parameter name, and the frozen weights that
        `WeightAccess.write` has changed.
        """
        base_parameters = lora.base_parameters(self.net)
        state: dict[str, Any] = {"version": self.version, "updates": self.updates} | {
            f"base/{name}": base_parameters[name].detach() for name in sorted(self.access.written)
        }
        state |= {f"mean/{name}": value for name, value in self.mean.items()}
        return state | optimiser_state(self.trained, self.optimiser)

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.version, self.updates = state["version"], state["updates"]
        self.access.write(
            {key.removeprefix("base/"): value for key, value in state.items() if key.startswith("base/")}
        )
        with torch.no_grad():
            for name, mean in self.mean.items():
                mean.copy_(state[f"mean/{name}"])
        restore_optimiser(self.trained, self.optimiser, state)
