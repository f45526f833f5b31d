"""Reading and moving a student's weights by name, for parts that work on the weights themselves
(extrapolation, spectra).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from reflux.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class WeightAccess(Protocol):
    """A learner may offer it (`OpenLearner.access`); training itself never needs it."""

    @property
    def names(self) -> Sequence[str]:
        """The student's parameters by the model's own names: the published weights without buffers and
        adapters.
        """
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of these full weights on the CPU, float32, adapters merged. ModelError where they are kept
        in a narrower type.
        """
        ...

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies on the CPU of what holds these weights: the parameter itself, or the frozen base under its
        adapters. See `write`.
        """
        ...

    def write(self, base: Mapping[str, Tensor]) -> None:
        """Put values where `base` read them: what `base` gave goes back bit for bit, and `base` plus d moves
        a full weight by d whether or not there are adapters (their factors stay). Optimiser moments and
        version stay, so what is published meanwhile is lent (`Services.lend`). A frozen base that was written
        to is part of the learner's state, and of what is exported.
        """
        ...


def required(access: WeightAccess | None, part: str) -> WeightAccess:
    """The access itself. ConfigError where the learner offers none and `part` (a recipe's key) cannot do
    without.
    """
    if access is None:
        raise ConfigError(
            f"{part} reads the student's weights by name, and this learner does not offer them. Leave {part} "
            "out."
        )
    return access


# what common architectures call these modules
INCLUDE = ("attn", "attention", "mlp", "ffn", ".ff", "feed_forward")


def moved(names: Iterable[str], include: Iterable[str]) -> list[str]:
    """The parameter names in which a part of `include` occurs. A name with "norm" counts only for a part that
    has "norm" itself.
    """
    parts = tuple(include)
    return [
        name
        for name in names
        if any(part in name and ("norm" in part or "norm" not in name) for part in parts)
    ]
