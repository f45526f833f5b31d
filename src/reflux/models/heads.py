"""The output heads of this process (the matrices that map hidden states to logits), by key. A target of
hidden states holds the key of its head, not the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflux.errors import ModelError

if TYPE_CHECKING:
    from reflux.kernels.head import Head


class Heads:
    """`heads[key]`. A teacher adds its head under the key "teachers.NAME" when the teacher is opened, and
    removes the head when the teacher is closed.
    """

    def __init__(self) -> None:
        self._heads: dict[str, Head] = {}

    def add(self, key: str, head: Head) -> str:
        """Add a head and return its key. ValueError where another head has this key, because the targets
        with this key would then be read through the wrong head.
        """
        if self._heads.setdefault(key, head) is not head:
            raise ValueError(f"another output head is already registered under the key '{key}'")
        return key

    def items(self) -> list[tuple[str, Head]]:
        return list(self._heads.items())

    def remove(self, key: str) -> None:
        self._heads.pop(key, None)

    def __getitem__(self, key: str) -> Head:
        if key not in self._heads:
            known = ", ".join(sorted(self._heads)) or "none"
            raise ModelError(
                f"a target needs the output head '{key}', but this process has no head of that name (it has: "
                f"{known}). Hidden states can "
                f"be read only where the teacher that gave them is open. Request log-probs from it there."
            )
        return self._heads[key]
