"""The quantities that the parts of a recipe require of each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requirements:
    """What the assembled parts want computed. Work nobody wants is not done; the largest k wins. Joined by
    `|`.
    """

    # the student's own top-k where it acted
    behaviour: int = 0
    # the student's log-probs of now at the ids of `behaviour`
    now_at_behaviour: bool = False
    now_topk: int = 0
    # the teacher's log-probs of the sampled tokens, at scoring time
    logp: bool = False
    # the teacher's log-probs at the student's top-k ids
    candidates: int = 0
    # and at the student's top-k ids of now
    now_candidates: int = 0
    # which characters of its text each token wrote
    spans: bool = False
    # which tokens are special and do not end a turn
    specials: bool = False
    reward: bool = False

    def __or__(self, other: Requirements) -> Requirements:
        return Requirements(
            behaviour=max(self.behaviour, other.behaviour),
            now_at_behaviour=self.now_at_behaviour or other.now_at_behaviour,
            now_topk=max(self.now_topk, other.now_topk),
            logp=self.logp or other.logp,
            candidates=max(self.candidates, other.candidates),
            now_candidates=max(self.now_candidates, other.now_candidates),
            spans=self.spans or other.spans,
            specials=self.specials or other.specials,
            reward=self.reward or other.reward,
        )
