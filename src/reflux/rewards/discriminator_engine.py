"""The opened discriminator: it scores attempts and learns from pairs of answers."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reflux.config.context import StudentSpec
from reflux.config.schedules import at
from reflux.errors import DataError, ModelError, StepRefused
from reflux.grading.graders import WHY_UNJUDGED
from reflux.models.chat.naming import about_prompt
from reflux.models.optimiser_state import optimiser_state, restore_optimiser
from reflux.models.scalar_model import ScalarModel
from reflux.models.text import Model, load_model
from reflux.models.training_mode import quiet_dropout, recompute_activations
from reflux.rewards.bradley_terry import Pairs, pair_accuracy, slopes
from reflux.storage import checkpoints
from reflux.types import UNJUDGED, Attempt, Group, Prompt, Reward, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.step_context import StepContext
    from reflux.rewards.discriminator import DiscriminatorReward
    from reflux.runtime.services import Services


class OpenDiscriminator:
    """`score` may be called for several groups at the same time, and while it learns."""

    def __init__(self, cfg: DiscriminatorReward, context: PartContext, services: Services, model: Model):
        self.cfg, self.context, self.services = cfg, context, services
        quiet_dropout(model.net)
        if cfg.gradient_checkpointing:
            recompute_activations(model.net)
        student = context.student
        self._renderer = model.renderer(student.system, student.template, student.prompt_suffix)
        self._model, self.scorer = model, ScalarModel(model, cfg.autocast)
        self.trained = self.scorer.trained
        # The rate is set at each step.
        self.optimiser = torch.optim.AdamW(
            list(self.trained.values()), lr=0.0, betas=cfg.betas, weight_decay=0.0, fused=True
        )
        # With max_staleness above 0 attempts are scored in another thread than the one that learns.
        self._turn = threading.Lock()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: DiscriminatorReward, context: PartContext, services: Services
    ) -> AsyncIterator[OpenDiscriminator]:
        spec = context.student if cfg.model is None else StudentSpec(cfg.model)
        where = "learner.model" if cfg.model is None else f"{context.name}.model"
        load = partial(
            load_model,
            spec.model,
            where,
            dtype="float32",
            device=cfg.device,
            trust_remote_code=spec.trust_remote_code,
            base=spec.base_model,
        )
        model = await services.run_model(load)
        services.tell(model.notes)
        if model.tokenizer.get_vocab() != services.tokenizer.get_vocab():
            raise ModelError(
                f"{where}: the tokens of {spec.model} are not those of the student, whose answers the "
                "discriminator reads. Choose a model of the student's family, or leave the key out."
            )
        yield cls(cfg, context, services, model)

    async def score(self, group: Group) -> list[Reward]:
        """The scores of the attempts. None during the warm-up, and for attempts without a verdict."""
        if group and group[0].asked_step < self.cfg.warmup_steps:
            why = (
                f"the discriminator learns alone in the first {self.cfg.warmup_steps} steps "
                f"({self.context.name}.warmup_steps)"
            )
            return [Reward(None, error=WHY_UNJUDGED.get(each.rollout.finish, why)) for each in group]
        started = time.perf_counter()
        rewards = await self.services.run_model(self._rewards, group)
        key = group[0].rollout.prompt.key if group else None
        self.services.clock.spent("rewards", "reward", started, group=key)
        return rewards

    def _rewards(self, group: Group) -> list[Reward]:
        texts = [_whole(attempt) for attempt in group if attempt.rollout.finish not in UNJUDGED]
        with self._turn:
            found = iter(self._measured(texts).tolist() if texts else ())
        why = [WHY_UNJUDGED.get(attempt.rollout.finish) for attempt in group]
        return [Reward(None, error=error) if error else _reward(next(found)) for error in why]

    def _measured(self, texts: Sequence[np.ndarray]) -> Tensor:
        return self.scorer.measured(texts, self.cfg.micro_batch_tokens)

    async def learn(self, groups: Sequence[Group], step_context: StepContext) -> None:
        """Make one optimiser step and report its numbers. StepRefused if the loss or the gradient is not
        finite; no weight has changed then.
        """
        started = time.perf_counter()
        numbers = await self.services.run_model(self._learn, groups, step_context.step)
        self.services.report(self.context.name, numbers)
        self.services.clock.spent("rewards", "reward", started, step=step_context.step + 1)

    def _learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        texts, sizes = self._texts(groups)
        pairs = Pairs.of(sizes)
        if not pairs.teacher_M:
            return {"pairs": 0}
        with self._turn:
            scores_N = self._measured(texts)
            loss, slopes_N = slopes(scores_N, pairs)
            self.optimiser.zero_grad(set_to_none=True)
            self.scorer.backward(texts, slopes_N, self.cfg.micro_batch_tokens)
            moved = self._move(float(loss), step)
        return {
            "loss": float(loss),
            "pair_accuracy": pair_accuracy(scores_N, pairs),
            "teacher_score": float(scores_N[pairs.teacher_M].mean()),
            "student_score": float(scores_N[pairs.student_M].mean()),
            **moved,
            "pairs": len(pairs.teacher_M),
        }

    def _move(self, loss: float, step: int) -> dict[str, float]:
        """Make the optimiser step along the accumulated gradient."""
        lr = at(self.cfg.lr, step)
        norm = float(nn.utils.clip_grad_norm_(list(self.trained.values()), self.cfg.clip))
        if not (np.isfinite(norm) and np.isfinite(loss)):
            found = f"loss {loss}, gradient norm {norm}"
            raise StepRefused(
                f"step {step + 1}: {self.context.name} has {found}. Both must be finite, so its optimiser "
                "step was not made. The usual reason is a learning rate that is too high: lower "
                f"{self.context.name}.lr (now {lr:g}).",
                f"{self.context.name}: {found}",
            )
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        return {"grad_norm": norm, "lr": lr}

    def _texts(self, groups: Sequence[Group]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        """The texts of all groups and their numbers, in the order that `Pairs.of` reads."""
        texts: list[np.ndarray] = []
        sizes: list[tuple[int, int]] = []
        for group in groups:
            judged = [attempt for attempt in group if attempt.rollout.finish not in UNJUDGED]
            if judged:
                answers = self._answers(judged[0])
                texts += [*answers, *map(_whole, judged)]
                sizes.append((len(answers), len(judged)))
        return texts, sizes

    def _answers(self, attempt: Attempt) -> list[np.ndarray]:
        """The teacher's answers behind the prompt of this attempt, each cut where an attempt would be."""
        rollout, prompt = _tokens(attempt), attempt.rollout.prompt
        answers = prompt.references[: self.cfg.references]
        if len(answers) < self.cfg.references:
            raise DataError(
                f"{self.context.name} needs {self.cfg.references} answers of the teacher to each prompt, and "
                f"prompt {prompt.id} has {len(answers)}."
            )
        room = self._model.context_tokens - rollout.prompt_length
        limit = max(1, min(self.context.numbers.training_positions, room))
        return [
            np.concatenate([rollout.prompt_tokens, self._ids(prompt, answer)[:limit]]) for answer in answers
        ]

    def _ids(self, prompt: Prompt, answer: str) -> np.ndarray:
        with about_prompt(prompt.id):
            ids = self._renderer.answer_ids(prompt.messages, answer, self._model.end_ids)
        return np.asarray(ids, dtype=np.int64)

    def save(self, folder: Path) -> None:
        checkpoints.write(folder, optimiser_state(self.trained, self.optimiser))

    def load(self, folder: Path) -> None:
        state: dict[str, Any] = checkpoints.read(folder)
        restore_optimiser(self.trained, self.optimiser, state)


def _reward(score: float) -> Reward:
    if np.isfinite(score):
        return Reward(score)
    return Reward(None, error=f"the discriminator's score is {score}, which is not finite")


def _tokens(attempt: Attempt) -> TokenRollout:
    assert isinstance(attempt.rollout, TokenRollout)
    return attempt.rollout


def _whole(attempt: Attempt) -> np.ndarray:
    """The tokens of prompt and attempt."""
    rollout = _tokens(attempt)
    return np.concatenate([rollout.prompt_tokens, rollout.tokens_T])
