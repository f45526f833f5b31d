"""What a served teacher asks, and which answers it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.clients.inference import TextScorer
from reflux.clients.probe import TOLERANCE_NATS, Abilities
from reflux.errors import BadAnswer, ModelError

if TYPE_CHECKING:
    from reflux.kernels.head import Head
    from reflux.teachers.answer_cache import Arrays

# Log-probs that differ by less are those of a uniform distribution.
UNIFORM_NATS = 1e-6
# A log-prob may be above 0 by rounding, in a server that computes in 16 bits.
ABOVE_ZERO_NATS = 1e-2


@dataclass(frozen=True, slots=True)
class Asked:
    """One request about the tokens ids[first:]. asked_TK: the ids whose log-probs are wanted. k: the number
    of the teacher's own most likely tokens. adapter: as in `teachers.vllm`.
    """

    ids: list[int]
    first: int
    asked_TK: np.ndarray | None
    k: int
    adapter: str | None


async def scored(scorer: TextScorer, gives: str, asked: Asked) -> Arrays:
    """The answer of a server as arrays. "hidden": h_TH. "student_topk": logp_TK at `asked_TK`. Else logp_T of
    the tokens, with ids_TK and logp_TK of the k most likely ones if k is not 0.
    """
    if gives == "hidden":
        return {"h_TH": await scorer.hidden_at(asked.ids, asked.first, asked.adapter)}
    if gives == "student_topk":
        assert asked.asked_TK is not None
        return {"logp_TK": await scorer.logp_at(asked.ids, asked.first, asked.asked_TK, asked.adapter)}
    found = await scorer.listed(asked.ids, asked.first, asked.k, asked.adapter)
    return (
        {"logp_T": found.logp_T}
        if not asked.k
        else {"logp_T": found.logp_T, "ids_TK": found.ids_TK, "logp_TK": found.logp_TK}
    )


def needed(gives: str, url: str, name: str, abilities: Abilities) -> None:
    """Raise ModelError where the servers did not prove what the teacher is to give (`gives`). url: the first
    of them. name: the NAME of the teacher's table.
    """
    lacking = {"hidden": not abilities.hidden, "student_topk": not abilities.given_ids}
    if not lacking.get(gives, False):
        return
    what, key, remedy = {
        "hidden": (
            "gives no hidden states",
            "hidden",
            "Start the server with the plugin of this package, or use gives = 'student_topk', which gives "
            "the student's most likely tokens and the exact tail instead of the full distribution.",
        ),
        "student_topk": (
            "gives no log-probs at given ids",
            "given_ids",
            "Use vLLM 0.32 or later on a GPU, or start the server with the plugin of this package. Or use "
            "gives = 'teacher_topk' with support = 'teacher': the teacher's log-probs at the student's other "
            "tokens are then unknown and count as one bucket. Or gives = 'sampled' with kind = 'sampled_kl', "
            "whose gradient has sampling noise.",
        ),
    }[gives]
    reason = abilities.missing.get(key, "").rstrip(".")
    raise ModelError(f"teachers.{name}: the server {url} {what} ({reason}). {remedy}")


def refuse_broken(arrays: Mapping[str, np.ndarray], vocabulary: int) -> None:
    """Raise BadAnswer for numbers that no model gives: NaN, hidden states that are not finite, log-probs
    above 0, lists with more mass than 1, ids outside the vocabulary, and a uniform distribution.
    """
    for name, values in arrays.items():
        if np.isnan(values).any() or (name == "h_TH" and not np.isfinite(values).all()):
            raise BadAnswer("the answer has values that are not numbers. Check the weights in the server.")
    logp = [values for name, values in arrays.items() if name.startswith("logp")]
    if any((values > ABOVE_ZERO_NATS).any() for values in logp):
        raise BadAnswer("the answer has log-probs above 0.")
    ids_TK = arrays.get("ids_TK")
    if ids_TK is not None and ids_TK.size:
        if ids_TK.min() < 0 or ids_TK.max() >= vocabulary:
            raise BadAnswer("the answer lists tokens that are not in the vocabulary.")
        if (np.exp(arrays["logp_TK"]).sum(1) > np.exp(ABOVE_ZERO_NATS)).any():
            raise BadAnswer("the probabilities of the listed tokens have a sum above 1.")
    _refuse_uniform([values for values in logp if values.size])


def _refuse_uniform(logp: Sequence[np.ndarray]) -> None:
    """All log-probs equal. One value alone says nothing, and 0 and -inf belong to a certain prediction."""
    values = np.concatenate([found.ravel() for found in logp]) if logp else np.zeros(0)
    if len(values) > 1 and values[0] < -UNIFORM_NATS and np.ptp(values) <= UNIFORM_NATS:
        raise BadAnswer("the answer gives every token the same probability.")


def refuse_flat(head: Head, h_TH: np.ndarray) -> None:
    """Raise BadAnswer where the first hidden state gives every token the same probability."""
    logits_V = head.logits(torch.from_numpy(h_TH[:1]).to(head.device))[0].float()
    if not float(logits_V.max() - logits_V.min()) > UNIFORM_NATS:
        raise BadAnswer("the answer gives every token the same probability.")


def refuse_foreign_head(
    head: Head, h_TH: np.ndarray, ids: Sequence[int], logp_T: np.ndarray, temperature: float, where: str
) -> None:
    """Raise ModelError where the hidden states of a server, through the head of this process, do not give the
    log-probs of the server. logp_T: those of ids[1:], at temperature 1. temperature: by which the head
    divides. where: the path of the key that names the head's model.
    """
    assert head.matrix is not None
    width = head.matrix[0].shape[1]
    if h_TH.shape[1] != width:
        raise ModelError(
            f"{where}: its output head takes {width} numbers, and the server "
            f"gives {h_TH.shape[1]}. Give the model that the server has loaded."
        )
    logits_TV = head.logits(torch.from_numpy(h_TH).to(head.device)).float() * temperature
    own_TV = logits_TV.log_softmax(-1).cpu()
    own_T = own_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    gap = float(np.abs(own_T - logp_T).max())
    if not gap <= TOLERANCE_NATS:
        raise ModelError(
            f"{where}: with its output head the log-probs differ from the "
            f"server's by up to {gap:.3g} nats. Give the model that the server has loaded."
        )
