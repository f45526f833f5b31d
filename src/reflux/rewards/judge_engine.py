"""The opened judge: scores of answers, or comparisons of each two in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from reflux.clients.chat_messages import ChatRequest, Schema
from reflux.rewards.chat_prompts import filled, labelled, prompt_text, question_of
from reflux.rewards.judge_forms import (
    MOST_SCORE,
    PREFERENCE_SCHEMA,
    SCORE_SCHEMA,
    Better,
    parse_preference,
    parse_score,
)
from reflux.rewards.judged_group import GroupJudge
from reflux.rewards.marked import Marked
from reflux.runtime.together import together
from reflux.types import Prompt, Reward

if TYPE_CHECKING:
    from reflux.clients.chat import ChatClient
    from reflux.rewards.judge import JudgeReward
    from reflux.runtime.services import Services

Parsed = TypeVar("Parsed")
# What the first of two answers gets.
WINS: dict[Better, float] = {"first": 1.0, "equal": 0.5, "second": 0.0}
FORMS = {"score": SCORE_SCHEMA, "preference": PREFERENCE_SCHEMA}


class OpenJudge(GroupJudge):
    """The opened reward. `score` may be called for several groups at the same time."""

    role = "judge"

    def __init__(self, part: JudgeReward, client: ChatClient, services: Services):
        self.services, self._part, self._client = services, part, client
        self._prompt = prompt_text(part.prompt_name, part.prompt)

    async def judged(self, prompt: Prompt, texts: list[str]) -> list[Reward]:
        """The rewards of the texts. Raises ServerError if a call fails."""
        question, different = question_of(prompt.messages), list(dict.fromkeys(texts))
        if self._part.mode == "score":
            found = await together(self._asked(question, [text], parse_score) for text in different)
            scores = dict(zip(different, found, strict=True))
            return [Reward(scores[text]) for text in texts]
        pairs = [(a, b) for pair in combinations(different, 2) for a, b in (pair, pair[::-1])]
        better = await together(self._asked(question, pair, parse_preference) for pair in pairs)
        won = {pair: WINS[found] for pair, found in zip(pairs, better, strict=True)}
        disagree = {"orders_differ": _disagreement(different, won)} if pairs else {}
        return [Reward(_mean_wins(index, texts, won), disagree) for index in range(len(texts))]

    async def _asked(self, question: str, answers: Sequence[str], parse: Callable[[str], Parsed]) -> Parsed:
        part, name = self._part, self._part.prompt_name
        groups = {"question": [Marked("Question", question)], "answers": labelled("Answer", answers)}
        text = filled(self._prompt, groups, {"most": MOST_SCORE})
        request = ChatRequest(
            role="judge",
            messages=({"role": "user", "content": text},),
            max_tokens=part.max_tokens,
            timeout_s=part.timeout_s,
            temperature=part.temperature,
            schema=Schema(name=name, schema=FORMS[name]),
        )
        return (await self._client.parsed(request, parse, part.repairs))[0]


def _mean_wins(index: int, texts: Sequence[str], won: dict[tuple[str, str], float]) -> float:
    """The mean over all other texts of what text `index` gets against them, in both orders."""
    own, others = texts[index], [text for place, text in enumerate(texts) if place != index]
    if not others:
        return 0.5
    shares = [0.5 if other == own else (won[own, other] + 1 - won[other, own]) / 2 for other in others]
    return sum(shares) / len(shares)


def _disagreement(texts: Sequence[str], won: dict[tuple[str, str], float]) -> float:
    """The share of pairs of different texts that are judged otherwise in the other order."""
    differ = [won[a, b] != 1 - won[b, a] for a, b in combinations(texts, 2)]
    return sum(differ) / len(differ)
