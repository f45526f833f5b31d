"""Whether the learner with low-rank adapters, the sampler and the exported student are one model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from architectures.parity import batched, own_logp, worst_of
from reflux.models import lora
from reflux.models.settings import Lora
from reflux.models.text import Model, load_model

# of random B matrices, so that the adapters count
DEVIATION = 0.1


def adapter_gaps(student: Path, folder: Path) -> dict[str, float]:
    """The largest differences of log-probs in nats from a learner with adapters: of a sampler with its
    published weights, and of its export, which goes to `folder`, as transformers loads it.
    """
    learner, sampler = (load_model(str(student), "learner.model", dtype="float32") for _ in range(2))
    lora.attach(learner, Lora(rank=2, alpha=4.0), seed=0)
    texts = [list(range(3, 3 + length)) for length in (20, 7)]
    move(learner, texts)
    return moved_gaps(learner, sampler, texts, folder)


def move(learner: Model, texts: list[list[int]]) -> None:
    """Random B matrices, except where the forward pass does not read the adapter. There training leaves it at
    zero.
    """
    torch.cat(batched(learner, texts)).square().sum().backward()
    dice = torch.Generator().manual_seed(1)
    for name, parameter in learner.net.named_parameters():
        if "lora_B" in name and parameter.grad is not None and parameter.grad.any():
            parameter.data.normal_(0, DEVIATION, generator=dice)


@torch.no_grad()
def moved_gaps(learner: Model, sampler: Model, texts: list[list[int]], folder: Path) -> dict[str, float]:
    learnt = batched(learner, texts)
    assert worst_of(learnt, batched(sampler, texts)) > 0, "the adapters change nothing"
    sampler.net.load_state_dict(lora.merged(learner.net), strict=False)
    lora.export(learner, folder)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        "sampler": worst_of(batched(sampler, texts), learnt),
        "exported student": worst_of(
            [own_logp(exported, text, learner.vocabulary) for text in texts], learnt
        ),
    }
