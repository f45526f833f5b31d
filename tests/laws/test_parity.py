"""Law 11. Sampler and learner give the same tokens the same log-probs, and text is never tokenised again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import outside
import tiny
from device import here
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.evals.gaps import Gaps
from reflux.learners.observe import logp
from reflux.loop import lasting, open_parts
from reflux.training import Options, Run
from reflux.types import Attempt, Prompt
from tiny import END

# between two float32 computations
BOUND_NATS = 1e-4
CHAT = {"kind": "outside:Chat"}


def act(
    cfg: Any, folder: Path, *, n: int = 3, prompts: list[Prompt] | None = None, **draw: Any
) -> tuple[list[Attempt], list[np.ndarray], Any]:
    """The attempts of a sampler, the learner's log-probs of their tokens, and the learner's model."""

    async def main() -> tuple[list[Attempt], list[np.ndarray], Any]:
        run = Run.open(cfg, Requirements(), Options(folder))
        async with (
            lasting(run),
            open_parts(replace(cfg, rewards={}, teachers={}), run.context, run.services) as (
                learner,
                sampler,
                *_,
            ),
        ):
            asked = prompts or list(islice(cfg.task.prompts("train", 0), 6))
            how = replace(SamplingParams(0, "train", 30, cohort=len(asked)), **draw)
            groups = await asyncio.gather(*(sampler.sample(prompt, n, how) for prompt in asked))
            return [attempt for group in groups for attempt in group], logp(learner, groups), learner.model

    return asyncio.run(main())


def config(student: str, teacher: str, **more: Any) -> Any:
    return tiny.config("opd", student, teacher, **({"task": CHAT} | more))


# the sampler's short decode step supports only the first
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sampler_and_learner_agree_with_unequal_prompts_and_rows_dropped_midway(
    student: str, teacher: str, tmp_path: Path, attention: str
) -> None:
    attempts, now, _ = act(config(student, teacher, sampler__attention=attention), tmp_path / "run")
    # unequal prompts, so there is left padding
    assert len({len(a.rollout.prompt_tokens) for a in attempts}) > 3
    # rows leave the batch at different positions
    assert len({a.rollout.length for a in attempts}) > 5
    for attempt, now_T in zip(attempts, now, strict=True):
        np.testing.assert_allclose(attempt.rollout.logp_T, now_T, atol=BOUND_NATS)
        assert attempt.rollout.logp_raw_T is None


@pytest.mark.parametrize("autocast", ["auto", "off"])
def test_in_bfloat16_the_median_and_the_tail_keep_their_bounds(
    student: str, teacher: str, tmp_path: Path, autocast: str
) -> None:
    """A sampler in bfloat16 and, on a GPU, a learner under autocast or without it."""
    more = {"sampler__dtype": "bfloat16", "learner__autocast": autocast}
    attempts, now, _ = act(config(student, teacher, **more), tmp_path / "run", n=8)
    gaps = [np.abs(a.rollout.logp_T - now_T) for a, now_T in zip(attempts, now, strict=True)]
    # 16 bits were at work, and nothing but their rounding
    assert max(gap_T.max() for gap_T in gaps) > BOUND_NATS
    assert Gaps("sampler and learner", gaps, narrow=True).verdict == "ok"


def test_both_agree_with_the_model_itself(student: str, teacher: str, tmp_path: Path) -> None:
    attempts, now, model = act(config(student, teacher), tmp_path / "run")
    for attempt, now_T in zip(attempts, now, strict=True):
        spoken = attempt.rollout
        ids = here(np.concatenate([spoken.prompt_tokens, spoken.tokens_T]))[None]
        with torch.no_grad():
            own_TV = model.net(input_ids=ids).logits[0, len(spoken.prompt_tokens) - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(
            own_TV[range(spoken.length), spoken.tokens_T].cpu().numpy(), now_T, atol=BOUND_NATS
        )


@pytest.mark.parametrize(
    "how", [{"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}, {"top_p": 0.5}, {"temperature": 0.0}]
)
def test_temperature_and_top_p_keep_the_raw_log_probs(
    student: str, teacher: str, tmp_path: Path, how: dict[str, float]
) -> None:
    attempts, now, model = act(config(student, teacher), tmp_path / "run", n=2, **how)
    for attempt, now_T in zip(attempts, now, strict=True):
        raw_T = attempt.rollout.logp_T if attempt.rollout.logp_raw_T is None else attempt.rollout.logp_raw_T
        np.testing.assert_allclose(raw_T, now_T, atol=BOUND_NATS)
    if how.get("temperature") == 0:
        assert len({tuple(a.rollout.tokens_T) for a in attempts[:2]}) == 1
        return
    spoken = max((a.rollout for a in attempts), key=lambda r: r.length)
    expected = tempered(model, spoken, how.get("temperature", 1.0), how.get("top_p", 1.0))
    np.testing.assert_allclose(spoken.logp_T, expected, atol=BOUND_NATS)
    assert spoken.logp_raw_T is not None


def tempered(model: Any, spoken: Any, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that is sampled from, computed from its definition with numpy."""
    ids = here(np.concatenate([spoken.prompt_tokens, spoken.tokens_T]))[None]
    with torch.no_grad():
        logits = (
            model.net(input_ids=ids).logits[0, len(spoken.prompt_tokens) - 1 : -1].double().cpu().numpy()
            / temperature
        )
    found = []
    for row, token in zip(logits, spoken.tokens_T, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
        assert token in kept
        found.append(np.log(p[token] / p[kept].sum()))
    return np.asarray(found)


def test_frequencies_are_the_models_probabilities(student: str, teacher: str, tmp_path: Path) -> None:
    """Chi-square over 6,000 first tokens of one prompt; each sample has its own random numbers."""
    cfg = config(student, teacher)
    attempts, _, model = act(
        cfg,
        tmp_path / "run",
        n=6000,
        prompts=list(islice(outside.Chat().prompts("train", 0), 1)),
        max_positions=1,
    )
    counts = Counter(int(a.rollout.tokens_T[0]) for a in attempts)  # type: ignore[attr-defined]
    ids = here(attempts[0].rollout.prompt_tokens)[None]  # type: ignore[attr-defined]
    with torch.no_grad():
        p = model.net(input_ids=ids).logits[0, -1].double().softmax(-1).cpu().numpy()
    likely = np.flatnonzero(p * 6000 >= 5)
    seen = np.asarray([*(counts[i] for i in likely), 6000 - sum(counts[i] for i in likely)])
    wanted = np.asarray([*p[likely], 1 - p[likely].sum()]) * 6000
    assert len(likely) > 10
    assert stats.chisquare(seen, wanted).pvalue > 1e-3


def test_several_turns_are_one_unbroken_row_of_tokens(student: str, teacher: str, tmp_path: Path) -> None:
    """User turns are present and not chosen; end tokens are chosen; no text is tokenised again."""
    cfg = config(student, teacher, task={"kind": "outside:Chat", "replies": 2})
    attempts, now, model = act(cfg, tmp_path / "run")
    reply = model.tokenizer("<user>go on<assistant>", add_special_tokens=False)["input_ids"]
    turns = Counter()
    for attempt, now_T in zip(attempts, now, strict=True):
        spoken = attempt.rollout
        mask_T, tokens_T = spoken.mask_T, spoken.tokens_T  # type: ignore[attr-defined]
        np.testing.assert_allclose(spoken.logp_T[mask_T], now_T[mask_T], atol=BOUND_NATS)
        assert not spoken.logp_T[~mask_T].any()
        replies = int((~mask_T).sum()) // len(reply)
        assert tokens_T[~mask_T].tolist() == reply * replies
        # the limit counts the student's tokens over all turns
        assert mask_T.sum() <= 30
        ends = np.flatnonzero(tokens_T == END)
        assert mask_T[ends].all()
        assert len(ends) == replies + (spoken.finish == "stop")
        # a reply follows directly after an end token
        assert all(not mask_T[place + 1] for place in ends[:replies])
        roles = [message["role"] for message in spoken.messages]  # type: ignore[attr-defined]
        assert roles == ["user", "assistant"] * (replies + 1)
        turns[replies] += 1
    assert turns[2] > 0
    assert turns[0] + turns[1] > 0


def test_turns_are_trained_on_where_the_student_chose(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("full", steps=1, task={"kind": "outside:Chat", "replies": 1}, sampler__max_tokens=24)
    attempts = {(r["prompt"], r["sample"]): r for r in done.rows("attempts") if r["kind"] == "attempt"}
    for line in (row for row in done.rows("attempts") if row["kind"] == "learned"):
        assert line["weight"] == [float(m) for m in attempts[line["prompt"], line["sample"]]["mask"]]
    assert any(0 in row["mask"] for row in attempts.values())
    assert done.rows("metrics")[0]["tokens_sampled"] == sum(sum(row["mask"]) for row in attempts.values())


def test_stored_answers_are_the_tokens_the_student_would_have_written(
    tiny_run: Callable[..., Any], student: str
) -> None:
    from reflux.models.text import load_tokenizer

    done = tiny_run("sft", steps=1, sampler__generate__max_tokens=200)
    tokenizer = load_tokenizer(student)
    for row in (row for row in done.rows("attempts") if row["kind"] == "attempt"):
        assert row["tokens"][-1] == END
        assert row["tokens"] == [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], END]
        assert row["finish"] == "stop"


def test_the_loss_of_stored_answers_is_that_of_transformers(
    tiny_run: Callable[..., Any], student: str
) -> None:
    from transformers import AutoModelForCausalLM

    from reflux.models.text import load_tokenizer
    from reflux.tasks.word_problems import WordProblems

    done = tiny_run("sft", steps=1, sampler__generate__max_tokens=200)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), load_tokenizer(student)
    total = count = 0.0
    for prompt in islice(WordProblems().prompts("train", 0), 4):
        turns = [*prompt.messages, {"role": "assistant", "content": prompt.references[0]}]
        asked = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        labels = [-100] * len(asked) + whole[len(asked) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * (len(whole) - len(asked)), count + len(whole) - len(asked)
    assert done.rows("metrics")[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert done.rows("metrics")[0]["tokens_trained"] == count
