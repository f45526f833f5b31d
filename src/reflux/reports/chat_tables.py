"""The report's table of requests to chat servers: what each role asked, what it lost and what it cost."""

from __future__ import annotations

from reflux.reports.formatting import visible
from reflux.reports.units import count

# (the name of a count, as `clients.usage` explains it; the title of its column)
_COLUMNS = (
    ("requests", "answered"),
    ("cached", "from disk"),
    ("replays", "tried again"),
    ("failed", "no answer"),
    ("invalid", "unusable answers"),
    ("prompt_tokens", "tokens sent"),
    ("completion_tokens", "tokens received"),
    ("cost", "cost"),
)
CHAT_HEADER = ("role", *(title for _, title in _COLUMNS))


def chat_table(sums: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """One row with the columns of `CHAT_HEADER` for each role, such as "rubric", and the total if there are
    several. Empty if no chat server was asked. sums: `Metrics.chat`.
    """
    whole = {name: sum(counts.get(name, 0.0) for counts in sums.values()) for name, _ in _COLUMNS}
    rows = [*sorted(sums.items()), *([("total", whole)] if len(sums) > 1 else [])]
    return [
        (visible(role), *(_amount(name, counts.get(name, 0.0)) for name, _ in _COLUMNS))
        for role, counts in rows
    ]


def _amount(name: str, value: float) -> str:
    return f"{value:,.4f}" if name == "cost" and value else count(value)
