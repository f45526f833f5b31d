"""What the rule server does wrong on demand, and how often."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Faults:
    """Faults of the rule server. Each share is that of the requests, except where another unit is named.

    Which requests fail depends on `seed` and on the request alone. Faults of the connection (slow, busy,
    failing, dropped, garbled) also depend on how often the request came before, so that another try may
    succeed. Faults of the content stay the same in every try.
    """

    # the share of questions to which one in four answers is wrong
    wrong_references: Share = 0.1
    # the share of single verdicts that are the opposite of what the rule says
    wrong_verdicts: Share = 0.0
    # answers that come `slow_s` seconds later
    slow: Share = 0.0
    # see `slow`
    slow_s: Seconds = 1.0
    # status 429, with `retry_after_s` in its header
    busy: Share = 0.0
    # see `busy`
    retry_after_s: Seconds = 0.1
    # status 500
    failing: Share = 0.0
    # connections that are closed in the middle of an answer
    dropped: Share = 0.0
    # bodies that are no complete JSON
    garbled: Share = 0.0
    # contents that end in the middle of their JSON
    cut_json: Share = 0.0
    # contents that stand in a code fence, which is allowed
    fenced: Share = 0.0
    # verdicts whose `final_score` is wrong
    lying_score: Share = 0.0
    # verdicts that leave out the last answer
    missing_answer: Share = 0.0
    # verdicts whose answers stand in the opposite order, each with its right number
    swapped: Share = 0.0
    # True: requests with a `response_format` are refused with status 400
    refuses_forms: bool = False
    # another seed strikes other requests
    seed: int = 0

    def strikes(self, share: float, name: str, *key: object) -> bool:
        """True if a fault happens to what `key` describes. share: its share. name: its name, so that several
        faults of one share do not happen together.
        """
        return seed_of("fault", self.seed, name, *key) < share * 2**63
