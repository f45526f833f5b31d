"""Findings of `reflux doctor` about memory: how rows are read, and the largest micro-batch that fits."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.evals.finding import Finding
from reflux.kernels.budget import table_bytes
from reflux.models.placement import autocasts
from reflux.models.text_shape import shape_of

if TYPE_CHECKING:
    from reflux.learners.hf_engine import HFLearner
    from reflux.models.device_memory import DeviceMemory

# tokens of the measured passes, and of each of their texts
_TOKENS, _TEXT = (512, 1024), 128
# share of the free memory that micro-batches may take
_SHARE = 0.8


def rows(readers: dict[str, Any]) -> Finding:
    """How each model in this process reads several texts. readers: the learner and the teachers, by name."""
    read = [
        f"{name} reads padded rows ({reader.padded_because})"
        if reader.padded_because
        else f"{name} reads packed rows"
        for name, reader in readers.items()
    ]
    return Finding("ok", "rows", "; ".join(read))


def memory(learner: HFLearner, device: DeviceMemory | None) -> Iterator[Finding]:
    """The memory per token of a micro-batch beside its estimate, and how many tokens fit. device: None where
    memory is not measured; then the memory that this process has taken.
    """
    estimate = _estimate(learner)
    kept = "" if estimate is None else f" (estimated activations {estimate / 1e6:.3g} MB)"
    if device is None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        text = f"this process has taken {most / 1e9:.2f} GB so far; a token of a micro-batch is not measured"
        yield Finding("ok", "memory", text + kept)
        return
    fixed, each = _line(learner, device)
    head = learner.model.net.get_output_embeddings().weight
    loss = table_bytes(learner.model.device.type) + 4 * head.numel()
    free = device.free_bytes()
    fitting = max(0, int((_SHARE * free - fixed - loss) / each))
    text = (
        f"a token of a micro-batch takes {each / 1e6:.3g} MB{kept}; {free / 1e9:.3g} GB are free, in which "
        f"micro-batches of up to {fitting:,} tokens fit"
    )
    yield Finding("ok" if fitting >= _TOKENS[0] else "warning", "memory", text)


def _estimate(learner: HFLearner) -> int | None:
    """Bytes of activations per token, from the model's config."""
    net, cfg = learner.model.net, learner.cfg
    shape = shape_of(net.config.get_text_config().to_dict(), net.state_dict())
    narrow = autocasts(cfg.autocast, learner.model.device)
    return None if shape is None else shape.activation_bytes(narrow, cfg.gradient_checkpointing)


def _line(learner: HFLearner, device: DeviceMemory) -> tuple[float, float]:
    """(fixed, each): n tokens take about fixed + each * n bytes, from passes of two sizes."""
    # The first pass allocates the gradients.
    _pass(learner, _TOKENS[0])
    taken = []
    for tokens in _TOKENS:
        device.begin()
        _pass(learner, tokens)
        taken.append(device.taken_bytes())
    learner.optimiser.zero_grad(set_to_none=True)
    each = max(1.0, (taken[1] - taken[0]) / (_TOKENS[1] - _TOKENS[0]))
    return max(0.0, taken[0] - each * _TOKENS[0]), each


def _pass(learner: HFLearner, tokens: int) -> None:
    """A forward and a backward pass of the trunk over texts of some ids. No weight changes."""
    from reflux.models.text_rows import packed, padded

    model = learner.model
    length = min(_TEXT, model.context_tokens)
    texts = [(start + np.arange(length)) % model.vocabulary for start in range(tokens // length)]
    read = packed(texts, model.device) if learner.packs else padded(texts, model.device)
    with learner.passing():
        read.states(model.trunk).float().mean().backward()
