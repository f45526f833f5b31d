"""The result of one check of the preflight or of `reflux doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    check: str
    text: str
