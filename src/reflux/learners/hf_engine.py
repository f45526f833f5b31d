"""The training state behind `learners.hf`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reflux import loss
from reflux.batch import Item, micro_batches, plan
from reflux.errors import StepRefused
from reflux.learners import adapters
from reflux.metrics import Max, Mean, Stats, Sum
from reflux.models import Model, load_model, parameter_count
from reflux.objectives.base import Objective
from reflux.schedules import at
from reflux.types import Group, Moment, seed_of

if TYPE_CHECKING:
    from reflux.learners.hf import HF
    from reflux.rundir import Run


class HFLearner:
    """Owns the float32 master weights and the optimiser."""

    def __init__(self, cfg: HF, run: Run, model: Model):
        self.cfg, self.run, self.model = cfg, run, model
        self.version = 0
        self.parameters = parameter_count(model.net)
        self._quiet_dropout()
        if cfg.lora:
            adapters.attach(model, cfg.lora, seed=seed_of(run.seed, "lora"))
        if cfg.gradient_checkpointing:
            model.net.gradient_checkpointing_enable()
            model.net.train()
        self.trained = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
        self._bases: set[str] = set()  # names of untrained parameters that were written to
        self.optimiser = torch.optim.AdamW(
            list(self.trained.values()), lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
        )

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: HF, run: Run) -> AsyncIterator[HFLearner]:
        model = await run.off_loop(
            partial(
                load_model,
                cfg.model,
                "learner.model",
                dtype="float32",
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=cfg.trust_remote_code,
            )
        )
        yield cls(cfg, run, model)

    def _quiet_dropout(self) -> None:
        """The student that moves must be the student that acted, so nothing is dropped."""
        for module in self.model.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif "attention_dropout" in vars(module):
                module.attention_dropout = 0.0

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return adapters.merged(self.model.net)

    @property
    def names(self) -> Sequence[str]:
        return list(adapters.homes(self.model.net))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes, names = adapters.homes(self.model.net), list(names)
        for name in names:
            adapters.refuse_narrow(name, homes[name])
        return {name: _copy(value) for name, value in adapters.merged(self.model.net, frozenset(names)).items()}

    def places(self, names: Iterable[str]) -> dict[str, Tensor]:
        homes = adapters.homes(self.model.net)
        return {name: _copy(adapters.refuse_narrow(name, homes[name])) for name in names}

    @torch.no_grad()
    def write(self, places: Mapping[str, Tensor]) -> None:
        homes, trained = adapters.homes(self.model.net), {id(parameter) for parameter in self.trained.values()}
        for name, value in places.items():
            home = adapters.refuse_narrow(name, homes[name])
            home.copy_(value)
            if id(home) not in trained:
                self._bases.add(name)

    async def observe(self, groups: Sequence[Group]) -> None:
        if self.run.wants.now_at_said or self.run.wants.now_topk:
            from reflux.learners.observe import observe

            await self.run.off_loop(observe, self, groups)

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
        lr = at(self.cfg.lr, moment.step)
        self.optimiser.zero_grad(set_to_none=True)
        stats = self._gradients(items, objectives)
        norm = float(nn.utils.clip_grad_norm_(list(self.trained.values()), self.cfg.clip))
        total = float(stats["loss"].value or 0.0)
        if not (np.isfinite(norm) and np.isfinite(total)):
            self.optimiser.zero_grad(set_to_none=True)
            kept = self.run.keep_refused(groups, f"loss {total}, gradient norm {norm}")
            raise StepRefused(
                f"step {moment.step + 1}: the loss is {total} and its gradient norm {norm}; the step was refused, no weight has changed. "
                f"The batch is in {kept}. Usual reasons: a learning rate too high (now {lr:g}), or a teacher that rules out a token "
                f"the student may say (forward and reverse KL are then infinite: use divergence = 'jsd')."
            )
        moves = norm > self.cfg.noise_floor
        if moves:
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.version += 1
        return stats | {"grad_norm": Max(norm), "lr": Max(lr), "updates": Sum(float(moves))}

    def _gradients(self, items: list[Item], objectives: Sequence[Objective]) -> Stats:
        """Accumulate the gradient of the whole batch; fill records with what the pass found out."""
        total, kl, outside, variance = Sum(0.0), Mean(), Mean(), Mean()
        for part in micro_batches(items, self.cfg.micro_batch_tokens):
            batch = loss.MicroBatch(part, objectives, self.model.device)
            with self.autocast():
                h_NH = self.hidden_rows(batch)
                result = loss.backward(batch, h_NH, self.model.head, self.run.cfg.log_variance)
            total = total + Sum(float(result.loss))
            if result.kl_N is not None:
                kl = kl + Mean.of(result.kl_N.double().cpu().numpy())
            outside = sum((Mean.of(rows_N.double().cpu().numpy()) for rows_N in result.outside), outside)
            if result.variance:
                variance = variance + Mean(*(float(part) for part in result.variance))
            _fill_records(part, result)
        stats: Stats = {"loss": total, "kl_nats": kl}
        if outside.count:
            stats["ratio_outside_share"] = outside
        if self.run.cfg.log_variance:
            stats["gradient_variance_ratio"] = variance if variance.count else Mean(1.0, 1.0)
        return stats

    def hidden_rows(self, batch: loss.MicroBatch) -> Tensor:
        """h_NH: the trunk's states that predict the kept positions. Right padding lies in the causal future: no mask is needed."""
        h_BLH = self.model.trunk(input_ids=batch.ids_BL, use_cache=False).last_hidden_state
        return h_BLH.flatten(0, 1)[batch.rows_N]

    def autocast(self) -> AbstractContextManager[Any]:
        wanted = self.cfg.autocast == "auto" and self.model.device.type == "cuda"
        return torch.autocast("cuda", dtype=torch.bfloat16) if wanted else nullcontext()

    def state(self) -> dict[str, Any]:
        """Trained weights and Adam's moments by parameter name, and the frozen weights that `write` was given."""
        homes = adapters.homes(self.model.net)
        state: dict[str, Any] = {"version": self.version} | {f"base/{name}": homes[name].detach() for name in sorted(self._bases)}
        for name, parameter in self.trained.items():
            state[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"adam.{key}/{name}"] = value
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.write({key.removeprefix("base/"): value for key, value in state.items() if key.startswith("base/")})
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[f"weight/{name}"])
                keys = [key.split("/", 1)[0] for key in state if key.startswith("adam.") and key.split("/", 1)[1] == name]
                moments = {key.removeprefix("adam."): state[f"{key}/{name}"].clone() for key in keys}
                if moments:
                    self.optimiser.state[parameter] = {
                        key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                    }

    def export(self, folder: Path) -> None:
        adapters.export(self.model, folder)


def _copy(value: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return value.detach().to("cpu", copy=True)


def _fill_records(items: list[Item], result: loss.Result) -> None:
    """What the teacher and the student of now gave the sampled tokens goes onto the attempt."""
    for name, column_N in result.logp.items():
        logp_N = column_N.float().cpu().numpy()
        start = 0
        for item in items:
            stop = start + len(item.rows_N)
            logp_T = np.full(item.rollout.length, np.nan, dtype=np.float32)
            logp_T[item.rows_N] = logp_N[start:stop]
            item.attempt.notes.setdefault("logp", {})[name] = logp_T
            start = stop
