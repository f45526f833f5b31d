"""Answers of a teacher that can only be read: texts, without log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reflux.clients.chat import ChatClient
from reflux.clients.chat_messages import ChatRequest
from reflux.errors import BadAnswer
from reflux.runtime.together import together
from reflux.types import Message


@dataclass(frozen=True, slots=True)
class TeacherSampling:
    """How answers are sampled."""

    count: int
    temperature: float
    max_tokens: int
    timeout_s: float

    @property
    def fingerprint(self) -> dict[str, object]:
        """What of it determines the answers."""
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}


async def teacher_answers(
    client: ChatClient, messages: Sequence[Message], sampling: TeacherSampling
) -> list[str]:
    """`sampling.count` answers to one prompt. Answer i is asked for with the seed i.

    Raises BadAnswer if an answer is empty or cut in two tries, and the errors of `ChatClient.answer`.
    """
    asked = ChatRequest(
        role="teacher",
        messages=tuple({"role": m["role"], "content": str(m["content"])} for m in messages),
        max_tokens=sampling.max_tokens,
        timeout_s=sampling.timeout_s,
        temperature=sampling.temperature,
    )
    requests = (replace(asked, seed=seed) for seed in range(sampling.count))
    return await together(_whole(client, request) for request in requests)


async def _whole(client: ChatClient, request: ChatRequest) -> str:
    text, _ = await client.parsed(request, str)
    if not text.strip():
        raise BadAnswer("the teacher's answer is empty")
    return text
