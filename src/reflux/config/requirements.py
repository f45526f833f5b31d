"""The quantities that parts of a recipe require from other parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requirements:
    """The quantities that parts of a recipe require of each attempt. Only required quantities are computed.
    `|` joins the requirements of two parts and takes the larger k.
    """

    # k of the top-k log-probs of the policy that sampled; 0: not required. For flows: its velocities
    behaviour: int = 0
    # the current student's log-probs at the token ids of `behaviour`; with `now_candidates` at as many of its
    # own likeliest
    now_at_behaviour: bool = False
    # k of the current student's top-k log-probs; 0: not required
    now_topk: int = 0
    # the teacher's log-probs of the sampled tokens, when the attempt is scored
    logp: bool = False
    # k of the student's top-k ids, as it sampled, at which the teacher gives log-probs; 0: not required
    candidates: int = 0
    # k of the current student's top-k ids at which the teacher gives log-probs; 0: not required
    now_candidates: int = 0
    # the KL of a teacher's answer to its previous one, where it was asked again because its context changed
    supervision_drift: bool = False
    # the characters of the text that each token wrote
    spans: bool = False
    # which tokens are special and do not end a turn
    specials: bool = False
    # a reward for every attempt
    reward: bool = False

    def __or__(self, other: Requirements) -> Requirements:
        return Requirements(
            behaviour=max(self.behaviour, other.behaviour),
            now_at_behaviour=self.now_at_behaviour or other.now_at_behaviour,
            now_topk=max(self.now_topk, other.now_topk),
            logp=self.logp or other.logp,
            candidates=max(self.candidates, other.candidates),
            now_candidates=max(self.now_candidates, other.now_candidates),
            supervision_drift=self.supervision_drift or other.supervision_drift,
            spans=self.spans or other.spans,
            specials=self.specials or other.specials,
            reward=self.reward or other.reward,
        )
