"""Requests to chat servers and their answers, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reflux.errors import BadAnswer

# {"role": "system" | "user" | "assistant", "content": text}
ChatMessage = Mapping[str, str]
# What the model is told about an answer that could not be used. Data of the conversation, not a setting.
REPAIR = (
    "Your last answer cannot be used: {reason} Answer again with the corrected JSON object alone, and write "
    "nothing before or after it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The form of an answer as a JSON schema. name: letters, digits, "_" and "-"."""

    name: str
    schema: Mapping[str, Any]

    @property
    def response_format(self) -> dict[str, Any]:
        return {
            "type": "json_schema",
            "json_schema": {"name": self.name, "strict": True, "schema": dict(self.schema)},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One answer that is asked for. What is None is left to the server's default."""

    # what the answer is for; requests, tokens and costs are counted by it
    role: str
    messages: tuple[ChatMessage, ...]
    max_tokens: int
    # seconds of one try; None: the client's
    timeout_s: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    schema: Schema | None = None
    # Tells apart requests that are equal otherwise. The server does not see it.
    number: int = 0

    def body(self, model: str, limit_key: str) -> dict[str, Any]:
        """The JSON of the request without `response_format`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            limit_key: self.max_tokens,
            **{key: value for key, value in sampling.items() if value is not None},
        }

    @property
    def tokens_at_most(self) -> int:
        """An estimate of the tokens that the request may use, a token for every three characters."""
        characters = sum(len(message["content"]) for message in self.messages)
        return self.max_tokens + -(-characters // 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    text: str
    # "stop", "length" where the answer was cut, or another word of the server
    finish: str
    # None where the server did not say
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    # the model that the server says it used
    model: str = ""

    def record(self) -> dict[str, Any]:
        """What is stored of it."""
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "model": self.model,
        }

    @classmethod
    def of_record(cls, found: Mapping[str, Any]) -> ChatAnswer:
        return cls(
            text=found["text"],
            finish=found["finish"],
            prompt_tokens=found["prompt_tokens"],
            completion_tokens=found["completion_tokens"],
            model=found["model"],
        )

    @property
    def unusable(self) -> Literal["", "empty", "cut"]:
        """Why the text cannot be read as a whole answer; "" if it can."""
        if self.finish == "length":
            return "cut"
        return "" if self.text.strip() else "empty"


def answer_in(completion: Any) -> ChatAnswer:
    """The answer in the JSON of a chat completion. Raises BadAnswer if it has another form."""
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("the answer is no chat completion with the one choice that was requested")
    message, usage = choices[0].get("message"), completion.get("usage")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not (text is None or isinstance(text, str)):
        raise BadAnswer("the answer has no message with a text")
    return ChatAnswer(
        text=text or "",
        finish=str(choices[0].get("finish_reason") or ""),
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        model=str(completion.get("model") or ""),
    )


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
