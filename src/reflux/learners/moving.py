"""What every learner in this process does with its network: AdamW on float32 master weights, and their average where one is kept."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reflux.batch import Item, plan
from reflux.errors import StepRefused
from reflux.learners import adapters
from reflux.metrics import Max, Stats, Sum
from reflux.objectives.base import Objective
from reflux.schedules import Number, at
from reflux.types import Group, Moment

if TYPE_CHECKING:
    from reflux.learners.flow import Average
    from reflux.rundir import Run


class Optimised(Protocol):
    """The fields of a learner's table that the optimiser reads."""

    @property
    def lr(self) -> Number: ...

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def clip(self) -> float: ...

    @property
    def noise_floor(self) -> float: ...


class Moving(ABC):
    """Owns the float32 master weights and the optimiser. A subclass makes the gradients."""

    refusal: str  # usual reasons why a loss is not finite, in a sentence

    def __init__(self, cfg: Optimised, run: Run, net: nn.Module, average: Average | None = None):
        """Trains the parameters of `net` that require a gradient."""
        self.settings, self.run, self.net, self.average = cfg, run, net, average
        self.version = 0
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.trained.items()} if average else {}
        self._bases: set[str] = set()  # names of untrained parameters that were written to
        self.optimiser = torch.optim.AdamW(
            list(self.trained.values()), lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
        )

    @abstractmethod
    def gradients(self, items: list[Item], objectives: Sequence[Objective]) -> Stats:
        """Accumulate the gradient of the whole batch, with its `loss` among the stats; fill records with what the pass found out."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return adapters.merged(self.net)

    @contextmanager
    def at_mean(self) -> Iterator[bool]:
        live = {name: parameter.detach().clone() for name, parameter in self.trained.items()} if self.average else {}
        self._put(self.mean)
        try:
            yield self.average is not None
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)

    @property
    def names(self) -> Sequence[str]:
        return list(adapters.homes(self.net))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes, names = adapters.homes(self.net), list(names)
        for name in names:
            adapters.refuse_narrow(name, homes[name])
        return {name: _copy(value) for name, value in adapters.merged(self.net, frozenset(names)).items()}

    def places(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes = adapters.homes(self.net)
        return {name: _copy(adapters.refuse_narrow(name, homes[name])) for name in names}

    @torch.no_grad()
    def write(self, places: Mapping[str, Tensor]) -> None:
        homes, trained = adapters.homes(self.net), {id(parameter) for parameter in self.trained.values()}
        for name, value in places.items():
            home = adapters.refuse_narrow(name, homes[name])
            home.copy_(value)
            if id(home) not in trained:
                self._bases.add(name)

    async def step(self, groups: Sequence[Group], objectives: Sequence[Objective], moment: Moment) -> Stats:
        return await self.run.off_loop(self._step, groups, objectives, moment)

    def _step(self, groups: Sequence[Group], objectives: Sequence[Objective], moment: Moment) -> Stats:
        started = time.perf_counter()
        items = plan(groups, objectives, self.run.cfg.normalise)
        stats: Stats = {"tokens_trained": Sum(sum(item.trained for item in items))}
        if items:
            stats |= self._move(groups, items, objectives, moment)
        self.run.clock.add("learn", time.perf_counter() - started)
        return stats

    def _move(self, groups: Sequence[Group], items: list[Item], objectives: Sequence[Objective], moment: Moment) -> Stats:
        lr = at(self.settings.lr, moment.step)
        self.optimiser.zero_grad(set_to_none=True)
        stats = self.gradients(items, objectives)
        norm = float(nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip))
        total = float(stats["loss"].value or 0.0)
        if not (np.isfinite(norm) and np.isfinite(total)):
            self.optimiser.zero_grad(set_to_none=True)
            kept = self.run.keep_refused(groups, f"loss {total}, gradient norm {norm}")
            raise StepRefused(
                f"step {moment.step + 1}: the loss is {total} and its gradient norm {norm}; the step was refused, no weight has changed. "
                f"The batch is in {kept}. Usual reasons: a learning rate too high (now {lr:g}), or {self.refusal}."
            )
        moves = norm > self.settings.noise_floor
        if moves:
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.version += 1
            self._follow()
        return stats | {"grad_norm": Max(norm), "lr": Max(lr), "updates": Sum(float(moves))}

    @torch.no_grad()
    def _follow(self) -> None:
        """The average takes a step towards the weights, every so many optimiser steps."""
        if self.average is not None and self.version % self.average.every == 0:
            for name, mean in self.mean.items():
                mean.lerp_(self.trained[name], 1 - self.average.decay)

    def state(self) -> dict[str, Any]:
        """Trained weights, their average and Adam's moments by parameter name, and the frozen weights that `write` was given."""
        homes = adapters.homes(self.net)
        state: dict[str, Any] = {"version": self.version} | {f"base/{name}": homes[name].detach() for name in sorted(self._bases)}
        state |= {f"mean/{name}": value for name, value in self.mean.items()}
        for name, parameter in self.trained.items():
            state[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"adam.{key}/{name}"] = value
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.write({key.removeprefix("base/"): value for key, value in state.items() if key.startswith("base/")})
        with torch.no_grad():
            for name, mean in self.mean.items():
                mean.copy_(state[f"mean/{name}"])
            for name, parameter in self.trained.items():
                parameter.copy_(state[f"weight/{name}"])
                keys = [key.split("/", 1)[0] for key in state if key.startswith("adam.") and key.split("/", 1)[1] == name]
                moments = {key.removeprefix("adam."): state[f"{key}/{name}"].clone() for key in keys}
                if moments:
                    self.optimiser.state[parameter] = {
                        key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                    }


def _copy(value: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return value.detach().to("cpu", copy=True)


def fill_records(items: Sequence[Item], logp: Mapping[str, Tensor]) -> None:
    """What the teachers and the student of now gave what was chosen goes onto the attempts."""
    for name, column_N in logp.items():
        for item, logp_T in unpacked(items, column_N):
            item.attempt.notes.setdefault("logp", {})[name] = logp_T


def unpacked(items: Sequence[Item], column_N: Tensor) -> Iterator[tuple[Item, np.ndarray]]:
    """A column of the items' rows, position by position of each item, float32; NaN where there is no row."""
    values_N = column_N.float().cpu().numpy()
    ends = np.cumsum([len(item.rows_N) for item in items])[:-1]
    for item, values in zip(items, np.split(values_N, ends), strict=True):
        values_T = np.full((item.rollout.length, *values.shape[1:]), np.nan, dtype=np.float32)
        values_T[item.rows_N] = values
        yield item, values_T
