"""How long a server wants to be left alone: the header Retry-After of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds to wait, from a number of seconds or a date. None if there is no such header, or if it cannot
    be read. Never below 0. now: the time to which a date is compared; None: the present.
    """
    written = headers.get("retry-after")
    if written is None:
        return None
    try:
        seconds = float(written)
    except ValueError:
        try:
            date = parsedate_to_datetime(written)
        except (TypeError, ValueError):
            return None
        # A date without a zone is in UTC, as RFC 9110 says.
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
