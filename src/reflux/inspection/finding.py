"""The result of one check of `reflux doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    verdict: Literal["ok", "warning", "failed"]
    check: str
    text: str
