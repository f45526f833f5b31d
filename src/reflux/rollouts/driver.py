"""Runs attempts turn by turn: render, generate, decode, ask the environment, append its reply, until the
attempt is done or a limit is reached.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from reflux.config.context import PartContext
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError
from reflux.models.chat.ends import special_ids
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.rng import row_key
from reflux.models.spans import CharacterSpans
from reflux.models.turns import Generator, TurnRequest
from reflux.rollouts.calls import EnvironmentCalls, Open, ended
from reflux.rollouts.conversation import Conversation
from reflux.rollouts.environment import Environment, Observation
from reflux.runtime.services import Deaf, Listener
from reflux.runtime.timers import Clock
from reflux.types import Attempt, Group, Prompt, TokenRollout

# A prompt, the number of attempts, and how they are sampled.
Asked = tuple[Prompt, int, SamplingParams]


@dataclass(frozen=True)
class Limits:
    """The limits that end an attempt."""

    # Tokens of the model's context window.
    context_tokens: int
    # Longest prompt in tokens; 0: what fits the context window.
    max_prompt_tokens: int = 0
    # "skip": an attempt with a longer prompt has finish "error" and no position.
    long_prompts: Literal["refuse", "skip"] = "refuse"
    # Most turns of an attempt; 0: no limit.
    max_turns: int = 0
    # Seconds for one answer of an environment.
    environment_timeout_s: float = 60.0


class Driver:
    """`play` returns the groups of one cohort (the groups of one optimiser step that are requested together).

    generator: the model that writes the turns. end_ids: the token ids that end its turns. A turn that ended
    at a stop text has none of these ids; the end token that the template writes is then read before the
    reply. listener: gets the first failure of each kind. clock: records the times of environments.

    turns "together": after the last environment has answered, one turn is generated for all attempts that
    continue, so every batch has the same composition in every run. "ready": a turn is generated for the
    attempts whose environment has answered, so a slow tool delays only its own attempt. Batches then depend
    on timing, and so do the last digits of log-probs. In both cases requests are in the order of prompts and
    samples.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Any,
        end_ids: Collection[int],
        context: PartContext,
        limits: Limits,
        *,
        turns: Literal["together", "ready"] = "together",
        listener: Listener | None = None,
        clock: Clock | None = None,
    ):
        self.generator, self.context, self.limits, self.end_ids = generator, context, limits, end_ids
        student = context.student
        self.renderer = Renderer(tokenizer, student.system, student.template, student.prompt_suffix)
        self.spans = CharacterSpans(tokenizer)
        self.special = sorted(special_ids(tokenizer, end_ids))
        self.environments = EnvironmentCalls(
            context.task, limits.environment_timeout_s, listener or Deaf(), clock or Clock()
        )
        # "together" waits for all of them, or for the first exception, which ends `play`.
        self._until = asyncio.FIRST_EXCEPTION if turns == "together" else asyncio.FIRST_COMPLETED

    async def play(self, asked: Sequence[Asked], version: int) -> list[Group]:
        """One group per entry of `asked` (a prompt, the number of attempts, and how they are sampled), in
        order. `version` is the policy version of attempts without any turn.

        ValueError if the attempts have different sampling parameters. An exception of an environment ends
        `play`, except ToolError.
        """
        draw = asked[0][2]
        if any(other != draw for _, _, other in asked):
            raise ValueError(
                "all prompts of one sampling call need the same SamplingParams (temperature, top_p, "
                "max_positions, stop and so on), but these differ"
            )
        async with self.environments.opened() as open_env:
            groups = [self._begin(prompt, n, draw, open_env) for prompt, n, _ in asked]
            await self._play([one for group in groups for one in group if one.finish != "error"], draw)
        return [[Attempt(self._rollout(one, draw, version)) for one in group] for group in groups]

    async def _play(self, ready: list[Conversation], draw: SamplingParams) -> None:
        order = {id(one): place for place, one in enumerate(ready)}
        # Attempts whose environments have not answered yet.
        waiting: dict[asyncio.Task[bool], Conversation] = {}
        try:
            while ready or waiting:
                await self._generate(ready, draw)
                asking = [
                    (one, one.environment)
                    for one in ready
                    if one.finish == "stop" and one.environment is not None
                ]
                waiting |= {
                    asyncio.create_task(self._answered(one, environment)): one for one, environment in asking
                }
                ready = sorted(await self._next(waiting), key=lambda one: order[id(one)])
        finally:
            for task in waiting:
                task.cancel()
            await ended(waiting)

    async def _next(self, waiting: dict[asyncio.Task[bool], Conversation]) -> list[Conversation]:
        """The attempts that continue, once their environments have answered. Answered attempts are removed
        from `waiting`.
        """
        if not waiting:
            return []
        answered, _ = await asyncio.wait(waiting, return_when=self._until)
        going = [one for task, one in waiting.items() if task in answered and task.result()]
        for task in answered:
            del waiting[task]
        return going

    def _begin(self, prompt: Prompt, n: int, draw: SamplingParams, open_env: Open) -> list[Conversation]:
        with about_prompt(prompt.id):
            ids = self.renderer.ids(prompt.messages)
        room = self.limits.context_tokens - len(ids)
        fits = self.limits.context_tokens - 1
        limit = min(self.limits.max_prompt_tokens or fits, fits)
        if len(ids) <= limit and room >= 1:
            length = min(draw.max_positions, room)
            return [
                Conversation(
                    prompt, sample, ids, list(prompt.messages), length, open_env(prompt, draw.completed)
                )
                for sample in range(n)
            ]
        if self.limits.long_prompts == "refuse":
            raise DataError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than the {limit} that fit (the student's "
                "context window is "
                f"{self.limits.context_tokens} tokens). Shorten it, or set sampler.long_prompts = 'skip' to "
                "leave such prompts out."
            )
        return [Conversation(prompt, sample, ids, [], 0, finish="error") for sample in range(n)]

    async def _generate(self, conversations: Sequence[Conversation], draw: SamplingParams) -> None:
        """Generate one more turn of each conversation."""
        if not conversations:
            return
        turns = await self.generator.generate([self._request(one, draw) for one in conversations])
        for one, turn in zip(conversations, turns, strict=True):
            text = self.spans.decode(turn.tokens)
            one.add_turn(turn, text[: len(text) - turn.beyond])

    def _request(self, one: Conversation, draw: SamplingParams) -> TurnRequest:
        key = row_key(
            self.context.seed, draw.purpose, draw.step, one.prompt.key, one.sample, len(one.turns), draw.rng
        )
        top_k = self.context.requirements.behaviour if draw.purpose == "train" else 0
        return TurnRequest(one.ids, one.tokens_left, key, draw, top_k)

    async def _answered(self, one: Conversation, environment: Environment) -> bool:
        """True if the attempt continues: its environment has answered, and there is room for one more
        turn.
        """
        observation = await self.environments.step(environment, one.prompt, dict(one.messages[-1]))
        if isinstance(observation, str):
            one.finish = observation
            return False
        if observation.reward is not None:
            one.reward = (one.reward or 0.0) + observation.reward
        if observation.done or not observation.messages:
            return False
        return self._goes_on(one, observation)

    def _goes_on(self, one: Conversation, observation: Observation) -> bool:
        if self.limits.max_turns and len(one.turns) >= self.limits.max_turns:
            one.finish = "max_turns"
            return False
        closed = one.turns[-1].tokens[-1] in self.end_ids
        with about_prompt(one.prompt.id):
            reply = self.renderer.reply_ids(one.messages, observation.messages, closed)
        tokens_left = min(one.tokens_left, self.limits.context_tokens - len(one.ids) - len(reply))
        if tokens_left < 1:
            one.finish = "length"
            return False
        # A copy, because the environment may change its own messages later.
        one.add_reply(reply, copy.deepcopy(observation.messages), tokens_left)
        return True

    def _rollout(self, one: Conversation, draw: SamplingParams, version: int) -> TokenRollout:
        requirements = self.context.requirements if draw.purpose == "train" else Requirements()
        made = one.rollout(version, self.spans.of_turns(one.turn_lengths()) if requirements.spans else None)
        return (
            replace(made, special_T=np.isin(made.tokens_T, self.special)) if requirements.specials else made
        )
