"""What every registered learner promises: it returns, and writes to no attempt."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import tiny
import tiny_flow
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.credit.prefix import Prefix
from reflux.errors import StepRefused
from reflux.learners import LEARNERS
from reflux.learners.learning import learn, observe
from reflux.loss.step import StepRequest
from reflux.models.text import as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.velocity_kl import VelocityKL
from reflux.types import Attempt, Group
from tiny import rollout

NOW = StepContext(3, 0)
LENGTHS = (4, 7, 5)


def of_text(requirements: Requirements, **fields: Any) -> tuple[Any, list[Group], Any]:
    learner, teacher = tiny.learner(tiny.net(1), **fields), as_model(tiny.net(2), character_tokenizer())
    learner.context = tiny.context(requirements)
    return learner, [[tiny.attempt(rollout(n, seed=n), teacher)] for n in LENGTHS], Divergence()


def of_ranks(requirements: Requirements, **fields: Any) -> tuple[Any, list[Group], Any]:
    """One rank, which leads. A process has one group at a time."""
    from reflux.learners.fsdp_engine import FSDPLearner
    from reflux.learners.hf_engine import HFLearner
    from reflux.learners.rank_group import RankGroup
    from reflux.learners.shards import Shards

    plain, groups, objective = of_text(requirements, **fields)
    end_group()
    group = RankGroup.join("cpu")
    local = HFLearner(plain.cfg, plain.context, plain.services, plain.model, Shards(group))
    return FSDPLearner(local, group), groups, objective


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    end_group()


def end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def of_flow(requirements: Requirements, **fields: Any) -> tuple[Any, list[Group], Any]:
    from reflux.learners.flow import Flow
    from reflux.learners.flow_engine import FlowLearner

    part = Flow(**{"model": "tiny", "lr": 0.0, "clip": 1e12, "weight_decay": 0.0, **fields})
    groups = [[tiny_flow.attempt(n, teacher=tiny_flow.model(2), seed=n)] for n in LENGTHS]
    return (
        FlowLearner(part, tiny.context(requirements), tiny.services(), tiny_flow.model(1)),
        groups,
        VelocityKL(),
    )


WORLDS: dict[str, Callable[..., tuple[Any, list[Group], Any]]] = {
    "hf": of_text,
    "fsdp": of_ranks,
    "flow": of_flow,
}
WANTED = {
    "hf": Requirements(now_topk=3),
    "fsdp": Requirements(now_topk=3),
    "flow": Requirements(now_at_behaviour=True),
}
every_learner = pytest.mark.parametrize("kind", sorted(LEARNERS))


def with_a_silent_one(kind: str, groups: list[Group]) -> list[Group]:
    """One more attempt in the middle, which no teacher answered about."""
    silent = Attempt(replace(groups[0][0].rollout, prompt=groups[1][0].rollout.prompt, sample=1))
    return [groups[0], [*groups[1], silent], groups[2]]


@every_learner
def test_a_learner_writes_to_no_attempt(kind: str) -> None:
    learner, groups, objective = WORLDS[kind](WANTED[kind])
    share_credit(groups, {"prefix": Prefix(3)}, NOW)
    before = [state_of(attempt) for group in groups for attempt in group]
    asyncio.run(learner.observe(groups))
    asyncio.run(learner.step(StepRequest(groups, [objective], NOW)))
    assert [state_of(attempt) for group in groups for attempt in group] == before


def state_of(attempt: Attempt) -> dict[str, Any]:
    """Every field, as bytes; of answers the arrays."""
    fields = {
        name: pickle.dumps(getattr(attempt, name))
        for name in Attempt.__dataclass_fields__
        if name != "answers"
    }
    answers = {
        name: [np.asarray(value).tobytes() for value in columns(answer.target)]
        for name, answer in attempt.answers.items()
    }
    return {"answers": answers, **fields}


def columns(target: Any) -> list[Any]:
    named = ("h_TH", "logp_T", "v_TD", "ids_TK", "logp_TK")
    return [
        getattr(target, name)
        for name in named
        if name in type(target).__dataclass_fields__ and getattr(target, name) is not None
    ]


@every_learner
def test_observe_returns_one_target_per_attempt_in_order(kind: str) -> None:
    learner, groups, _ = WORLDS[kind](WANTED[kind])
    # the attempts are of an older student
    learner.version = 1
    failed = Attempt(replace(groups[0][0].rollout, finish="error"))
    found = asyncio.run(learner.observe([groups[0], [failed, *groups[1]], groups[2]]))
    assert [target is None for target in found] == [False, True, False, False]
    alone = [asyncio.run(learner.observe([group]))[0] for group in groups]
    for one, other in zip([found[0], *found[2:]], alone, strict=True):
        assert type(one) is type(other)
        assert all(
            np.allclose(a, b, atol=1e-4, equal_nan=True)
            for a, b in zip(columns(one), columns(other), strict=True)
        )


@every_learner
def test_observe_returns_nothing_where_nothing_is_wanted(kind: str) -> None:
    learner, groups, _ = WORLDS[kind](Requirements())
    assert asyncio.run(learner.observe(groups)) == [None] * 3


@every_learner
def test_step_returns_one_record_per_attempt_in_order(kind: str) -> None:
    """NaN where the step computed nothing: beyond a prefix, and where the student did not choose; None where
    nobody had a say.
    """
    learner, groups, objective = WORLDS[kind](Requirements())
    groups = with_a_silent_one(kind, groups)
    share_credit(groups, {"prefix": Prefix(2)}, NOW)
    result = asyncio.run(learner.step(StepRequest(groups, [objective], NOW)))
    attempts = [attempt for group in groups for attempt in group]
    assert [record is None for record in result.records] == [False, False, True, False]
    for attempt, record in zip(attempts, result.records, strict=True):
        if record is not None:
            assert record.logp.keys() == {"student", "main"}
            for column_T in (*record.logp.values(), record.kl_T):
                assert np.flatnonzero(np.isfinite(column_T)).tolist() == [0, 1]
                assert column_T.shape == (attempt.rollout.length,)
            assert (record.kl_T[:2] >= 0).all()


@every_learner
def test_kl_by_position_adds_up_to_the_metric_however_the_batch_is_cut(kind: str) -> None:
    size = "micro_batch" if kind == "flow" else "micro_batch_tokens"
    found = []
    for room in (1, 1 << 20):
        learner, groups, objective = WORLDS[kind](Requirements(), **{size: room})
        result = asyncio.run(learner.step(StepRequest(groups, [objective], NOW)))
        kls = np.concatenate([record.kl_T for record in result.records])
        assert np.nanmean(kls) == pytest.approx(result.stats["kl_nats_trained"].value, rel=1e-5)
        found.append(kls)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@every_learner
def test_a_learner_reads_the_denominator_from_its_request(kind: str) -> None:
    losses = {}
    for loss_aggregation in ("token-mean-weighted", "token-mean"):
        learner, groups, objective = WORLDS[kind](Requirements())
        share_credit(groups, {"prefix": Prefix(2)}, NOW)
        losses[loss_aggregation] = (
            asyncio.run(learner.step(StepRequest(groups, [objective], NOW, loss_aggregation)))
            .stats["loss"]
            .value
        )
        chosen = sum(int(attempt.rollout.mask_T.sum()) for group in groups for attempt in group)
    assert losses["token-mean"] == pytest.approx(losses["token-mean-weighted"] * (2 * 3) / chosen, rel=1e-5)


@every_learner
def test_a_refused_step_gives_reason_and_records_and_the_loop_names_the_file(kind: str) -> None:
    learner, groups, objective = WORLDS[kind](Requirements(), lr=0.1)
    array = columns(groups[1][0].target("main"))[0]
    array[0] = np.nan
    with pytest.raises(StepRefused, match="no weight has changed") as caught:
        asyncio.run(learner.step(StepRequest(groups, [objective], NOW)))
    assert caught.value.why.startswith("loss nan")
    assert len(caught.value.records) == 3
    # it may come from another process
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.why, len(again.records)) == (str(caught.value), caught.value.why, 3)
    assert all(attempt.learned is None for group in groups for attempt in group)
    kept: list[Any] = []
    with pytest.raises(StepRefused, match=r"step 4: .*The batch is in here\.jsonl"):
        asyncio.run(
            learn(
                learner,
                StepRequest(groups, [objective], NOW),
                lambda *batch: kept.append(batch) or "here.jsonl",
            )
        )  # type: ignore
    assert kept == [(groups, caught.value.why)]
    # the file shows what the pass found
    assert all(attempt.learned is not None for group in groups for attempt in group)
    assert learner.version == 0


def test_attempts_of_the_current_student_are_not_observed_at_their_own_lists() -> None:
    learner, groups, _ = WORLDS["flow"](Requirements(behaviour=1, now_at_behaviour=True))
    assert asyncio.run(learner.observe(groups)) == [None] * sum(map(len, groups))


@every_learner
def test_the_loop_stores_what_a_learner_returns(kind: str) -> None:
    learner, groups, objective = WORLDS[kind](WANTED[kind])
    learner.version = 1
    asyncio.run(observe(learner, groups))
    result = asyncio.run(
        learn(learner, StepRequest(groups, [objective], NOW), lambda *_: pytest.fail("nothing was refused"))
    )
    attempts = [attempt for group in groups for attempt in group]
    assert all(attempt.now is not None for attempt in attempts)
    assert [attempt.learned for attempt in attempts] == list(result.records)


@every_learner
def test_every_learner_here_offers_its_weights(kind: str) -> None:
    learner, *_ = WORLDS[kind](Requirements())
    assert list(learner.access.names) == [
        name for name, _ in learner.model.net.named_parameters(remove_duplicate=False)
    ]
