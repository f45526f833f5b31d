"""The model behind `samplers.hf`: requests of one cohort become batched decoding, turn by turn."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from reflux.errors import DataError
from reflux.kernels.cpu_decoder import cpu_decoder
from reflux.models import Model, load_model
from reflux.samplers.decode import Ask, Turn, decode
from reflux.samplers.in_process import InProcess, Request
from reflux.samplers.noise import row_key
from reflux.tokens import CharacterSpans
from reflux.types import Attempt, Draw, Finish, Group, Message, Prompt, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.rundir import Run
    from reflux.samplers.hf import HF


@dataclass
class _Talk:
    """One attempt under way: what has been read and written, over all its turns."""

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    messages: list[Message]
    budget: int
    turns: list[Turn] = field(default_factory=list)
    heard: list[list[int]] = field(default_factory=list)  # reply ids after each turn but the last
    finish: Finish = "length"


class HFSampler(InProcess):
    """A language model: batched decoding, turn by turn."""

    def __init__(self, cfg: HF, run: Run, model: Model):
        super().__init__(run)
        self.cfg, self.model = cfg, model
        self.decoder = cpu_decoder(model)
        self.renderer = model.renderer(cfg.system, cfg.template)
        self.spans = CharacterSpans(model.tokenizer)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: HF, run: Run, model: str | None = None) -> AsyncIterator[HFSampler]:
        name = model or run.cfg.learner.model
        loaded = await run.off_loop(
            partial(
                load_model,
                name,
                "learner.model" if model is None else "model",
                dtype=cfg.dtype,
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=run.cfg.learner.student.trust_remote_code,
            )
        )
        loaded.net.requires_grad_(False)
        yield cls(cfg, run, loaded)

    def _sample(self, requests: list[Request]) -> list[Group]:
        started = time.perf_counter()
        draw = requests[0][2]
        talks = [[self._begin(prompt, sample, draw) for sample in range(n)] for prompt, n, _ in requests]
        live = [talk for group in talks for talk in group if talk.finish != "error"]
        while live:
            self._turn(live, draw)
            live = [talk for talk in live if self._goes_on(talk, draw)]
        groups = [[Attempt(self._rollout(talk, draw)) for talk in group] for group in talks]
        self.run.clock.add("sample" if draw.purpose == "train" else draw.purpose, time.perf_counter() - started)
        return groups

    def _begin(self, prompt: Prompt, sample: int, draw: Draw) -> _Talk:
        ids = self.renderer.ids(prompt.messages)
        room = self.model.context_tokens - len(ids)
        limit = self.cfg.max_prompt_tokens or self.model.context_tokens - 1
        if len(ids) > limit or room < 1:
            if self.cfg.long_prompts == "refuse":
                raise DataError(
                    f"prompt {prompt.id} has {len(ids)} tokens, more than the {limit} that fit (the student's context window is "
                    f"{self.model.context_tokens}). Shorten it, or set sampler.long_prompts = 'skip' to leave such prompts out."
                )
            return _Talk(prompt, sample, ids, [], 0, finish="error")
        return _Talk(prompt, sample, ids, list(prompt.messages), min(draw.length, room))

    def _turn(self, talks: Sequence[_Talk], draw: Draw) -> None:
        """One more turn for every talk, in chunks of similar length cut by the token budget."""
        said_k = self.run.wants.said if draw.purpose == "train" else 0
        asks = [(talk, self._ask(talk, draw)) for talk in talks]
        asks.sort(key=lambda pair: -len(pair[1].ids))
        while asks:
            widest = max(len(ask.ids) for _, ask in asks) + max(ask.budget for _, ask in asks)
            count = max(1, self.cfg.batch_tokens // widest)
            chunk, asks = asks[:count], asks[count:]
            turns = decode(self.model, [ask for _, ask in chunk], draw, said_k, self.decoder)
            for (talk, _), turn in zip(chunk, turns, strict=True):
                talk.turns.append(turn)

    def _ask(self, talk: _Talk, draw: Draw) -> Ask:
        ids = list(talk.prompt_ids)
        for turn, heard in zip(talk.turns, talk.heard, strict=True):
            ids += turn.tokens + heard
        key = row_key(self.run.seed, draw.purpose, draw.step, talk.prompt.id, talk.sample, len(talk.turns), draw.dice)
        return Ask(ids, key, talk.budget)

    def _goes_on(self, talk: _Talk, draw: Draw) -> bool:
        """Ask the task for a reply after an ended turn; False once the attempt is finished."""
        turn = talk.turns[-1]
        talk.budget -= len(turn.tokens)
        talk.messages.append({"role": "assistant", "content": self._text(turn.tokens)})
        if not turn.ended:
            return False
        talk.finish = "stop"
        replies = self.run.task.reply(talk.prompt, tuple(talk.messages), draw.step)
        if not replies or talk.budget < 1:
            talk.finish = "length" if replies else "stop"
            return False
        heard = self.renderer.reply_ids(talk.messages, replies)
        room = self.model.context_tokens - len(self._ask_ids(talk)) - len(heard)
        if room < 1:
            talk.finish = "length"
            return False
        talk.heard.append(heard)
        talk.messages += replies
        talk.budget = min(talk.budget, room)
        talk.finish = "length"  # unless the next turn ends
        return True

    def _ask_ids(self, talk: _Talk) -> list[int]:
        heard = [*talk.heard, []]
        return talk.prompt_ids + [i for turn, reply in zip(talk.turns, heard, strict=True) for i in turn.tokens + reply]

    def _text(self, ids: list[int]) -> str:
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def _rollout(self, talk: _Talk, draw: Draw) -> TokenRollout:
        pieces = list(zip(talk.turns, [*talk.heard, []], strict=False))
        tokens = [i for turn, heard in pieces for i in turn.tokens + heard]
        mask = [chosen for turn, heard in pieces for chosen in [True] * len(turn.tokens) + [False] * len(heard)]
        logp_T, raw_T = _column(pieces, "logp_T"), _column(pieces, "raw_T")
        texts = [message["content"] for message in talk.messages[len(talk.prompt.messages) :] if message["role"] == "assistant"]
        wanted = self.run.wants.spans and draw.purpose == "train"
        return TokenRollout(
            prompt=talk.prompt,
            sample=talk.sample,
            version=self.version,
            finish=talk.finish,
            mask_T=np.asarray(mask, dtype=bool),
            logp_T=logp_T,
            logp_raw_T=None if np.array_equal(raw_T, logp_T) else raw_T,
            said=_said(pieces, raw_T) if pieces and pieces[0][0].said_TK is not None else None,
            prompt_tokens=np.asarray(talk.prompt_ids, dtype=np.int64),
            tokens_T=np.asarray(tokens, dtype=np.int64),
            text="\n".join(texts),
            messages=tuple(talk.messages),
            spans_T2=self._spans(pieces, texts) if wanted else None,
        )

    def _spans(self, pieces: list[tuple[Turn, list[int]]], texts: list[str]) -> np.ndarray:
        return self.spans.of_turns([(turn.tokens, text, len(heard)) for (turn, heard), text in zip(pieces, texts, strict=True)])


def _column(pieces: list[tuple[Turn, list[int]]], name: str) -> np.ndarray:
    parts = [part for turn, heard in pieces for part in (getattr(turn, name), np.zeros(len(heard)))]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _said(pieces: list[tuple[Turn, list[int]]], raw_T: np.ndarray) -> TopKTarget:
    """The student's own top-k where it acted; unchosen positions hold a uniform placeholder that no rule reads (mask_T is False)."""
    ids, logp = [], []
    for turn, heard in pieces:
        assert turn.said_TK is not None
        k = turn.said_TK[0].shape[1]
        ids += [turn.said_TK[0], np.tile(np.arange(k), (len(heard), 1))]
        logp += [turn.said_TK[1], np.full((len(heard), k), -np.log(k))]
    return TopKTarget(teacher="said", ids_TK=np.concatenate(ids), logp_TK=np.concatenate(logp).astype(np.float32), logp_T=raw_T)
