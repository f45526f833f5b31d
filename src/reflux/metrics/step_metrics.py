"""The metrics of one optimiser step: a line of metrics.jsonl."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from reflux.metrics.flops import Ran, Work, flops
from reflux.metrics.teacher_distance import generated_kl, sampled_entropy, teacher_nats, trained_kl
from reflux.metrics.values import Mean, Stats, merge
from reflux.types import Attempt, Credit, Finish, Group

if TYPE_CHECKING:
    from reflux.metrics.flops import Spent
    from reflux.runtime.services import Services


# the learner's numbers that `step_metrics` puts in a place of their own
_PLACED = ("loss", "tokens_trained", "updates")


def step_metrics(
    stats: Stats,
    ran: Ran,
    groups: Sequence[Group],
    version: int,
    tables: Mapping[str, str],
    teacher_macs: Mapping[str, int],
    services: Services,
    discarded: Work,
    scored: Spent | None,
    on_policy: bool,
) -> dict[str, Any]:
    """All metrics of one step as plain JSON values. The caller adds the key `step`.

    stats: the learner's numbers. ran: the positions that the learner ran. groups: the attempts of the step.
    version: of the policy before this step. tables: the alias of each teacher, by the teacher's key in the
    recipe (NAME of `[teachers.NAME]`). teacher_macs: multiply-accumulates of one position, by the same key.
    services: their clock, usage and reports of parts are read. discarded: computation for attempts of this
    step that were discarded and sampled again. scored: the cost of scoring weights for extrapolation since
    the last step; None if none were scored. on_policy: True if the student sampled the attempts.
    """
    attempts = [attempt for group in groups for attempt in group]
    live = [attempt for attempt in attempts if attempt.rollout.finish != "error"]
    values = {name: metric.value for name, metric in stats.items()}
    stalenesses = [version - attempt.rollout.version for attempt in live]
    work = Work.of(attempts)
    by_table = _asked(live, tables)
    everything = work + discarded + (scored.work if scored else Work())
    return {
        "loss": values.get("loss", 0.0),
        **(_generated(live) if on_policy else {}),
        **{name: value for name, value in values.items() if name not in _PLACED},
        "updates": int(values.get("updates") or 0),
        "staleness_mean": Mean.of(stalenesses).value,
        "staleness_max": max(stalenesses, default=None),
        "tokens_sampled": work.sampled,
        "tokens_trained": int(values.get("tokens_trained") or 0),
        **_unused(discarded, scored),
        "response_tokens_mean": Mean.of([a.rollout.mask_T.sum() for a in live]).value,
        "truncated": Mean.of([a.rollout.finish == "length" for a in live]).value,
        "finishes": {
            finish: sum(a.rollout.finish == finish for a in attempts) for finish in get_args(Finish)
        },
        "errors": len(attempts) - len(live),
        **_by_teacher(live, by_table, tables),
        "reward_mean": Mean.of([a.verdict for a in live if a.verdict is not None]).value,
        "ungraded": sum(a.reward is not None and a.verdict is None for a in live),
        **_spent(services),
        "flops": flops(ran, teacher_macs, everything),
        "credit": _credit(live),
        "context": _context(live),
        "peak_memory_bytes": _peak_memory(),
    }


def _generated(attempts: list[Attempt]) -> dict[str, float]:
    """The KL to teacher `main` and the entropy of the student that sampled, where they are known."""
    found = {"kl_nats": generated_kl(attempts, "main").value, "entropy_nats": sampled_entropy(attempts).value}
    return {name: value for name, value in found.items() if value is not None}


def _by_teacher(
    live: list[Attempt], by_table: Mapping[str, list[Attempt]], tables: Mapping[str, str]
) -> dict[str, Any]:
    """The numbers of each teacher. by_table: the attempts that each table was asked about."""
    return {
        "without_target": _without_target(live, tables),
        "asked": {table: len(heard) for table, heard in by_table.items()},
        "answer_errors": _answer_errors(live, tables),
        "kl_nats_trained_by_table": {
            table: trained_kl(heard, tables[table]).value for table, heard in by_table.items()
        },
        "teacher_nats_by_table": {
            table: teacher_nats(heard, tables[table]) for table, heard in by_table.items()
        },
    }


def _unused(discarded: Work, scored: Spent | None) -> dict[str, int]:
    """Tokens that no step trains on; empty where there are none."""
    counts = {"tokens_scored": scored.sampled} if scored else {}
    return counts | ({"tokens_discarded": discarded.sampled} if scored or discarded.sampled else {})


def _without_target(attempts: list[Attempt], tables: Mapping[str, str]) -> dict[str, int]:
    """The number of attempts without a target, by teacher name."""
    return {
        name: sum(attempt.target(name) is None for attempt in attempts)
        for name in sorted(set(tables.values()))
    }


def _asked(attempts: list[Attempt], tables: Mapping[str, str]) -> dict[str, list[Attempt]]:
    """The number of attempts that each teacher was asked to score, by its key in the recipe. Of several
    teachers with one alias, this shows one that gets no prompts of its routes.
    """
    return {
        table: [a for a in attempts if table in (answer.table for answer in a.answers.values())]
        for table in tables
    }


def _answer_errors(attempts: list[Attempt], tables: Mapping[str, str]) -> dict[str, int]:
    """The number of attempts that each teacher was asked to score and could not, by its key in the recipe."""
    failed = [
        answer.table
        for attempt in attempts
        for answer in attempt.answers.values()
        if answer.error is not None
    ]
    return {table: failed.count(table) for table in tables}


def _context(attempts: list[Attempt]) -> dict[str, dict[str, float | None]]:
    """The notes of each teacher's context, averaged over the attempts that have them. By teacher
    name; only names with notes.
    """
    found: dict[str, dict[str, Mean]] = {}
    for attempt in attempts:
        for name, answer in attempt.answers.items():
            for key, note in answer.context_notes.items():
                known = found.setdefault(name, {})
                known[key] = known.get(key, Mean()) + Mean(note, 1)
    return {
        name: {key: mean.value for key, mean in sorted(means.items())}
        for name, means in sorted(found.items())
    }


def _credit(attempts: list[Attempt]) -> dict[str, dict[str, float | None]]:
    """For each credit rule: the mean weight and mean advantage offset over the sampled positions,
    and its notes merged over the attempts that have them.
    """
    said: dict[str, list[Stats]] = {}
    for attempt in attempts:
        for name, share in attempt.credits.items():
            said.setdefault(name, []).append(_share(share, attempt.rollout.mask_T))
    return {
        name: {key: metric.value for key, metric in sorted(merge(found).items())}
        for name, found in said.items()
    }


def _share(share: Credit, mask_T: np.ndarray) -> Stats:
    return {
        "weight_mean": Mean.of(np.broadcast_to(share.weight_T, mask_T.shape)[mask_T]),
        "advantage_offset_mean": Mean.of(np.broadcast_to(share.advantage_offset_T, mask_T.shape)[mask_T]),
        **{
            key: Mean(note, 1) if isinstance(note, float | int) else note for key, note in share.notes.items()
        },
    }


def _spent(services: Services) -> dict[str, Any]:
    """Since the last step: seconds, the requests to chat servers if there were any, and what parts report."""
    used = services.usage.take()
    return {"seconds": services.clock.take(), **({"chat": used} if used else {}), **services.take_reported()}


def _peak_memory() -> int:
    """Peak memory in bytes: that of the fullest GPU if a GPU is used, otherwise that of this process."""
    import torch

    if torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(place) for place in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
