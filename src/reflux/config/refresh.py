"""The table [refresh]: when the attempts in flight are discarded because the supply as a whole is stale."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT


@dataclass(frozen=True, config=STRICT)
class Refresh:
    """After a step whose batch was stale, the attempts in flight are discarded, and their prompts are sampled
    again with the current weights. Needs max_staleness above 0. arXiv 2605.17862 (f-OPD).
    """

    # refresh where the mean freshness of the batch is at most this; "none": whenever `every` allows it
    below: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        BeforeValidator(lambda value: None if value == "none" else value),
    ] = None
    # with `below`: refresh also where fewer of the attempts than this share have both drifts
    min_aligned: Annotated[float, Field(ge=0, le=1)] = 0.5
    # fewest optimiser steps from one refresh to the next
    every: Annotated[int, Field(ge=1)] = 200
