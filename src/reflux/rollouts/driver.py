"""Plays attempts turn by turn: render, generate, decode, ask the environment, append its reply, until done or a limit is met."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from reflux.context import PartContext
from reflux.errors import DataError
from reflux.rollouts.conversation import Conversation
from reflux.rollouts.environment import Observation, ToolError
from reflux.rollouts.turns import Generator, TurnRequest
from reflux.samplers.noise import row_key
from reflux.tokens import CharacterSpans, Renderer, special_ids
from reflux.types import Attempt, Draw, Group, Prompt, TokenRollout, Wants

Asked = tuple[Prompt, int, Draw]  # a prompt, the number of attempts, and how they are sampled


@dataclass(frozen=True)
class Limits:
    """What ends an attempt besides its own end."""

    context_tokens: int  # of the model
    max_prompt_tokens: int = 0  # 0: what the context window leaves
    long_prompts: Literal["refuse", "skip"] = "refuse"  # skip: the attempt has finish "error" and no position
    max_turns: int = 0  # 0: no limit
    environment_timeout_s: float = 60.0  # of one answer


class Driver:
    """`play` gives the groups of one cohort.

    turns "together": a turn is generated for all attempts that go on at once, when the last environment has answered, so the composition of
    every batch is the same in every run. "ready": a turn is generated for those that are answered, and a slow tool holds up its own attempt
    alone; batches then depend on timing, and with them the last digits of log-probs.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Any,
        end_ids: Collection[int],
        context: PartContext,
        limits: Limits,
        turns: Literal["together", "ready"] = "together",
    ):
        """`end_ids` are those that end a turn of the generator."""
        self.generator, self.tokenizer, self.context, self.limits = generator, tokenizer, context, limits
        student = context.student
        self.renderer = Renderer(tokenizer, student.system, student.template, student.prompt_suffix)
        self.spans = CharacterSpans(tokenizer)
        self.special = sorted(special_ids(tokenizer, end_ids))
        self._until = asyncio.ALL_COMPLETED if turns == "together" else asyncio.FIRST_COMPLETED

    async def play(self, asked: Sequence[Asked], version: int) -> list[Group]:
        """One group per prompt, in order; all of `asked` are sampled in one way. `version` is that of attempts without any turn."""
        draw = asked[0][2]
        groups = [[self._begin(prompt, sample, draw) for sample in range(n)] for prompt, n, _ in asked]
        every = [one for group in groups for one in group]
        try:
            await self._play([one for one in every if one.finish != "error"], draw)
        finally:
            await asyncio.gather(*(one.environment.close() for one in every if one.environment is not None))
        return [[Attempt(self._rollout(one, draw, version)) for one in group] for group in groups]

    async def _play(self, ready: list[Conversation], draw: Draw) -> None:
        places = {id(one): place for place, one in enumerate(ready)}
        waiting: dict[asyncio.Task[bool], Conversation] = {}  # for their environments
        try:
            while ready or waiting:
                await self._generate(ready, draw)
                asking = [one for one in ready if self._ended_its_turn(one) and one.environment is not None]
                waiting |= {asyncio.ensure_future(self._answered(one)): one for one in asking}
                answered, _ = await asyncio.wait(waiting, return_when=self._until) if waiting else (set(), set())
                ready = [one for task, one in waiting.items() if task in answered and task.result()]
                ready.sort(key=lambda one: places[id(one)])
                waiting = {task: one for task, one in waiting.items() if task not in answered}
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _begin(self, prompt: Prompt, sample: int, draw: Draw) -> Conversation:
        ids = self.renderer.ids(prompt.messages)
        room = self.limits.context_tokens - len(ids)
        limit = self.limits.max_prompt_tokens or self.limits.context_tokens - 1
        if len(ids) <= limit and room >= 1:
            environment = self.context.task.open_env(prompt)
            return Conversation(prompt, sample, ids, list(prompt.messages), min(draw.length, room), environment)
        if self.limits.long_prompts == "refuse":
            raise DataError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than the {limit} that fit (the student's context window is "
                f"{self.limits.context_tokens}). Shorten it, or set sampler.long_prompts = 'skip' to leave such prompts out."
            )
        return Conversation(prompt, sample, ids, [], 0, finish="error")

    async def _generate(self, conversations: Sequence[Conversation], draw: Draw) -> None:
        """One more turn of each."""
        if not conversations:
            return
        turns = await self.generator.generate([self._request(one, draw) for one in conversations])
        for one, turn in zip(conversations, turns, strict=True):
            one.turns.append(turn)
            one.tokens_left -= len(turn.tokens)
            one.messages.append({"role": "assistant", "content": self.spans.decode(turn.tokens)})

    def _request(self, one: Conversation, draw: Draw) -> TurnRequest:
        key = row_key(self.context.seed, draw.purpose, draw.step, one.prompt.id, one.sample, len(one.turns), draw.dice)
        top_k = self.context.requirements.said if draw.purpose == "train" else 0
        return TurnRequest(one.ids, one.tokens_left, key, draw, top_k)

    def _ended_its_turn(self, one: Conversation) -> bool:
        one.finish = one.turns[-1].finish
        return one.finish == "stop"

    async def _answered(self, one: Conversation) -> bool:
        """Whether the attempt goes on: its environment has answered, and there is room for one more turn."""
        assert one.environment is not None
        try:
            async with asyncio.timeout(self.limits.environment_timeout_s):
                observation = await one.environment.step(one.messages[-1])
        except TimeoutError:
            one.finish = "timeout"
            return False
        except ToolError:
            one.finish = "tool_error"
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
        reply = self.renderer.reply_ids(one.messages, observation.messages)
        room = self.limits.context_tokens - len(one.ids) - len(reply)
        one.tokens_left = min(one.tokens_left, room)
        if one.tokens_left < 1:
            one.finish = "length"
            return False
        one.replies.append(reply)
        one.messages += observation.messages
        return True

    def _rollout(self, one: Conversation, draw: Draw, version: int) -> TokenRollout:
        wants = self.context.requirements if draw.purpose == "train" else Wants()
        made = one.rollout(version, self.spans.of_turns(one.turn_lengths()) if wants.spans else None)
        return replace(made, special_T=np.isin(made.tokens_T, self.special)) if wants.specials else made
