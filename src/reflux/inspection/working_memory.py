"""An estimate of the memory that a run of texts takes while it works, besides weights and optimiser."""

from __future__ import annotations

from dataclasses import dataclass

from reflux.config.recipe import RunConfig
from reflux.kernels.budget import table_bytes
from reflux.models.sizes import Size

# bytes of one number of a sampler's cache, by the sampler's dtype
_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes, for the longest texts that the limits allow. Learning and sampling take turns.

    device: "GPU" or "CPU". activations: of one micro-batch, kept for its backward pass. loss: tables of
    logits and the gradient of the output head. cache: the sampler's keys and values.
    """

    device: str
    activations: int
    loss: int
    cache: int

    @property
    def peak(self) -> int:
        return max(self.activations + self.loss, self.cache)


def working_memory(cfg: RunConfig, student: Size, limit: int, gpu: bool) -> WorkingMemory | None:
    """The estimate; None for flow models and for models that are not known. limit: the most positions of a
    training attempt. Prompts count as long as answers, because no text is read here.
    """
    shape = student.shape
    if shape is None or student.parameters is None or student.stored_bytes is None:
        return None
    tokens = 2 * cfg.prompts_per_step * cfg.group_size * limit
    kept = cfg.learner.activation_bytes(shape, gpu, tokens)
    if not kept:
        return None
    given = cfg.sampler.precision
    # On a CPU "auto" is float32 where 16 bits are slower.
    stored = max(1, round(student.stored_bytes / student.parameters)) if gpu else 4
    item = stored if given == "auto" else 2 if given in _NARROW else 4
    return WorkingMemory(
        device="GPU" if gpu else "CPU",
        activations=kept,
        loss=min(table_bytes("cuda" if gpu else "cpu"), 8 * tokens * shape.vocabulary)
        + 4 * shape.vocabulary * shape.width,
        cache=min(cfg.sampler.cache_tokens, tokens) * shape.cache_bytes(item),
    )
