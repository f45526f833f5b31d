"""Read and write the student's weights by name. Used by parts that work on the weights themselves, such as
extrapolation and spectra.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from reflux.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class WeightAccess(Protocol):
    """Reads and writes the student's weights by name. A learner may offer it as `OpenLearner.access`.
    Extrapolation and evaluations of the weights use it. The learner's training steps do not.
    """

    @property
    def names(self) -> Sequence[str]:
        """The student's parameters by the model's own names. These are the published weights without buffers
        and adapters.
        """
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the full weights with these names on the CPU, in float32, with LoRA adapters merged.
        ModelError if the learner keeps the weights in a type narrower than float32.
        """
        ...

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies on the CPU of the tensors that hold the weights with these names: the parameter itself, or,
        with adapters, the frozen base weight. See `write`.
        """
        ...

    def write(self, base: Mapping[str, Tensor]) -> None:
        """Write parameter tensors. Writing back the values that `base` returned restores them bit for bit.
        With LoRA this writes the frozen base weight, so adding d to the values returned by `base` changes the
        merged weight by d and leaves the LoRA matrices A and B unchanged. base: the new values by name.

        Optimiser moments and the version stay unchanged. Weights that are published between two writes
        therefore need another version number, which `Services.lend` gives. A frozen base weight that was
        written to becomes part of the learner's saved state and of its export.
        """
        ...


def required(access: WeightAccess | None, part: str) -> WeightAccess:
    """Return `access`. ConfigError if it is None, that is, if the learner does not offer access. part: the
    path of the recipe key that needs the access, for the error.
    """
    if access is None:
        raise ConfigError(
            f"{part} reads the student's weights by name, and this learner does not offer them. Leave {part} "
            "out."
        )
    return access


# Name parts that common architectures use for attention and MLP modules.
INCLUDE = ("attn", "attention", "mlp", "ffn", ".ff", "feed_forward")


def moved(names: Iterable[str], include: Iterable[str]) -> list[str]:
    """Those of the parameter `names` that contain at least one of the texts in `include`. A name that
    contains "norm" matches only a text that contains "norm" itself.
    """
    parts = tuple(include)
    return [
        name
        for name in names
        if any(part in name and ("norm" in part or "norm" not in name) for part in parts)
    ]
