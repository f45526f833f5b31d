"""The teacher sees some of the other attempts at the same problem, correct and failed, before it scores an
attempt.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext, seed_of
from reflux.contexts.base import ContextPart, TeacherPrompt, retold
from reflux.contexts.wording import with_attempts
from reflux.rewards.base import unlike_threshold
from reflux.types import Attempt, Group, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

THINKING = re.compile(r"<(/?)think>")

PEERS = Paper(
    "peers", "Multi-Rollout On-Policy Distillation via Peer Successes and Failures", "2605.12652", 2026
)
SDPO = Paper(
    "sdpo",
    "Reinforcement Learning via Self-Distillation",
    "2601.20802",
    2026,
    'H{\\"u}botter, Jonas and L{\\"u}beck, Frederike and Behric, Lejs and Baumann, Anton and others',
)


@dataclass(frozen=True, config=STRICT)
class Peers(ContextPart):
    """The last user message becomes: the problem; the first `successes` correct attempts of the group in
    order; then `failures` failed attempts drawn at random, each under its heading; feedback on the attempt
    itself; and a line that asks for a correct solution. The attempt itself is never shown. All other messages
    stay unchanged. If fewer attempts are available, fewer are shown. If there is nothing to show, the teacher
    does not score the attempt.

    threshold: an attempt with a reward of at least `threshold` is correct, one below it failed. An attempt
    that ended in an error, or whose reward is missing or NaN, is neither: it is not shown and not scored.
    failures_when: show failures always, or only if no success is shown. feedback: show the verifier's text on
    the attempt itself (`Reward.feedback`) only if no success is shown, always, or never. The built-in
    verifier gives no text, so this has an effect only with a custom reward that does. peer_tokens: a longer
    peer is cut to its first `peer_tokens` chosen tokens; peers are cut, never the closing line.
    strip_thinking: the text between <think> and </think> is not shown. An unclosed <think> hides all text
    after it, and an unopened </think> hides all text before it. Of an attempt with several turns, all text
    that the student wrote is shown, with one line break between turns and without the replies.

    The random choice of failures depends only on (run seed, prompt id, policy version, sample), so the same
    attempt always gets the same context. With successes = 1 and failures = 0 it is the context of SDPO (arXiv
    2601.20802). All attempts of a group see the same first success (except that success itself), so their
    targets are correlated. A twin, that is another attempt with the same text as this one, may be shown; the
    teacher then reads the text that it scores. Notes: `successes` and `failures` shown, `twin_fraction` (1 if
    a twin is among them), `cut_failures` (failures shown that ended at the length limit), `shortened` (peers
    cut to `peer_tokens`), `distinct` (number of different texts divided by the number of judged attempts of
    the group; it falls when students learn to copy). arXiv 2605.12652 (MR-OPD).
    """

    when: ClassVar[str] = (
        "There is a verifier, no better model, and a model that can use what it reads. A frozen reader may "
        "teach another "
        'student instead: `learner.model=reflux:student` with `teachers.main={kind="local", '
        'model="reflux:reader", '
        'context={kind="peers"}}`. Every prompt needs its group; where all attempts fail and none is shown, '
        "nothing is taught. "
        "With models from the hub raise `sampler.max_prompt_tokens` or lower "
        "`teachers.main.context.peer_tokens` so that "
        "problem, peers and answer fit the window."
    )

    # Correct attempts to show at most.
    successes: int = 2
    # Failed attempts to show at most.
    failures: int = 1
    # Smallest reward of a correct attempt.
    threshold: float = 0.5
    # When failed attempts are shown.
    failures_when: Literal["always", "no_success"] = "always"
    # When feedback on the attempt itself is shown.
    feedback: Literal["no_success", "always", "never"] = "no_success"
    # Longest peer, in chosen tokens.
    peer_tokens: int = 4096
    # True: the text between <think> and </think> is not shown.
    strip_thinking: bool = False

    min_group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.successes < 0 or self.failures < 0:
            raise ValueError("successes and failures are counts of attempts and must not be negative")
        if not self.successes and not self.failures:
            raise ValueError(
                'successes = 0 and failures = 0 show no peer at all. Use context = { kind = "same" }'
            )
        if self.peer_tokens < 1:
            raise ValueError(f"peer_tokens must be at least 1, got {self.peer_tokens}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite number, got {self.threshold}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (PEERS, SDPO) if (self.successes, self.failures) == (1, 0) else (PEERS,)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return unlike_threshold(where, self.threshold, cfg.rewards)

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True, spans=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        judged = [
            (place, reward)
            for place, reward in enumerate(attempt.verdict for attempt in group)
            if reward is not None
        ]
        peers = [group[place] for place, _ in judged]
        correct = [reward >= self.threshold for _, reward in judged]
        distinct = len({_spoken(peer).text for peer in peers}) / max(1, len(peers))
        texts = [shown_text(peer, self.peer_tokens, self.strip_thinking) for peer in peers]
        views: list[TeacherPrompt | None] = [None] * len(group)
        for index, (place, _) in enumerate(judged):
            right, wrong = choose(
                correct, index, self.successes, self.failures, _rng(peers[index], step_context)
            )
            if right and self.failures_when == "no_success":
                wrong = []
            views[place] = self._view(peers, texts, index, right, wrong, distinct)
        return views

    def _view(
        self,
        peers: Group,
        texts: list[tuple[str, bool]],
        index: int,
        right: list[int],
        wrong: list[int],
        distinct: float,
    ) -> TeacherPrompt | None:
        attempt, shown = peers[index], [*right, *wrong]
        feedback = self._feedback(attempt, bool(right))
        if not (shown or feedback):
            return None
        own = _spoken(attempt).text
        notes = {
            "successes": len(right),
            "failures": len(wrong),
            "twin_fraction": any(_spoken(peers[i]).text == own for i in shown),
            "cut_failures": sum(peers[i].rollout.finish == "length" for i in wrong),
            "shortened": sum(texts[i][1] for i in shown),
            "distinct": distinct,
        }
        successes, failures = ([texts[i][0] for i in some] for some in (right, wrong))
        messages = retold(
            attempt.rollout.prompt.messages,
            lambda problem: with_attempts(problem, successes, failures, feedback),
        )
        return TeacherPrompt(messages, notes={key: float(value) for key, value in notes.items()})

    def _feedback(self, attempt: Attempt, has_success: bool) -> str | None:
        wanted = self.feedback == "always" or (self.feedback == "no_success" and not has_success)
        return attempt.reward.feedback if wanted and attempt.reward else None

    def most_added(self, longest: int, count: Callable[[str], int]) -> int:
        """Largest number of tokens that this context adds to a prompt, without feedback. longest: the number
        of tokens of the longest attempt. count: a function that gives the number of tokens of a text.

        A peer's text is tokenised again as text. It may then have a few more tokens than when it was sampled.
        """
        blocks = self.successes + self.failures
        # The texts are replaced by digits, which are one token each and are subtracted again. With empty
        # texts, adjacent line breaks might merge into fewer tokens.
        wording = with_attempts("0", ["0"] * self.successes, ["0"] * self.failures)
        return count(wording) - (blocks + 1) + blocks * min(self.peer_tokens, longest)


def choose(
    correct: Sequence[bool], index: int, successes: int, failures: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """The indices of the attempts that the teacher sees for attempt `index`: the first `successes` correct
    ones in rising order, and `failures` failed ones in the order drawn, without the attempt itself. correct:
    for each attempt of the group, True if it is correct.

    If fewer are available, fewer are returned. `rng` is used only for the failures. ValueError for an index
    outside the list or a negative count.
    """
    if not 0 <= index < len(correct):
        raise ValueError(f"index {index} lies outside a group of {len(correct)}")
    if successes < 0 or failures < 0:
        raise ValueError(f"successes and failures must not be negative, got {successes} and {failures}")
    others = [place for place in range(len(correct)) if place != index]
    right = [place for place in others if correct[place]]
    wrong = [place for place in others if not correct[place]]
    return right[:successes], rng.sample(wrong, min(failures, len(wrong)))


def shown_text(attempt: Attempt, peer_tokens: int, strip_thinking: bool) -> tuple[str, bool]:
    """The text that is shown of a peer (another attempt of the group), and True if `peer_tokens` cut it. The
    cut keeps the text up to the first `peer_tokens` chosen tokens that wrote part of the text.
    strip_thinking: as in `Peers`.

    ValueError for an attempt with more positions than `peer_tokens` and without `spans_T2`.
    """
    rollout = _spoken(attempt)
    shown_C = ~thinking(rollout.text) if strip_thinking else np.ones(len(rollout.text), dtype=bool)
    end = _end(rollout, shown_C, peer_tokens) if rollout.length > peer_tokens else None
    if not strip_thinking:
        return rollout.text[:end], end is not None
    return "".join(itertools.compress(rollout.text[:end], shown_C)).strip(), end is not None


def _end(rollout: TokenRollout, shown_C: np.ndarray, peer_tokens: int) -> int | None:
    """The index of the character after the first `peer_tokens` tokens that wrote shown text; None if there
    are no more such tokens than that.
    """
    if rollout.spans_T2 is None:
        raise ValueError(
            f"prompt {rollout.prompt.id}, sample {rollout.sample}: its {rollout.length} positions are more "
            "than peer_tokens = "
            f"{peer_tokens}, and the sampler did not record which characters each position wrote "
            "(spans_T2). Raise peer_tokens, or use sampler 'hf'."
        )
    before_C = np.concatenate([[0], np.cumsum(shown_C)])
    start_T, end_T = np.minimum(rollout.spans_T2, len(shown_C)).T
    wrote = np.flatnonzero(before_C[end_T] > before_C[start_T])
    return int(end_T[wrote[:peer_tokens]].max()) if len(wrote) > peer_tokens else None


def thinking(text: str) -> np.ndarray:
    """True at the characters of thinking, tags included. Tags may be nested. An unclosed tag reaches to the
    end of the text. A closing tag before any other tag marks all text before it as thinking, because a
    template may open the thinking in the prompt. A later closing tag without an opening one marks only
    itself.
    """
    inside_C = np.zeros(len(text), dtype=bool)
    depth = start = 0
    for number, tag in enumerate(THINKING.finditer(text)):
        if not tag[1]:
            start = start if depth else tag.start()
            depth += 1
            continue
        if depth <= 1:
            begin = start if depth else tag.start() if number else 0
            inside_C[begin : tag.end()] = True
        depth = max(0, depth - 1)
    if depth:
        inside_C[start:] = True
    return inside_C


def _rng(attempt: Attempt, step_context: StepContext) -> random.Random:
    rollout = attempt.rollout
    return random.Random(
        seed_of(step_context.seed, "peers", rollout.prompt.key, rollout.version, rollout.sample)
    )


def _spoken(attempt: Attempt) -> TokenRollout:
    if not isinstance(attempt.rollout, TokenRollout):
        raise ValueError(
            "contexts.peers shows the text of other attempts, and attempts of a flow have no text. Use "
            "context = 'same'"
        )
    return attempt.rollout
