"""The output heads of this process, by key: a target of hidden states names its head, and travels without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflux.errors import ModelError

if TYPE_CHECKING:
    from reflux.kernels.head import Head


class Heads:
    """`heads[key]`. A teacher adds its own when it is opened, under "teachers.<table>", and takes it back
    when it is closed.
    """

    def __init__(self) -> None:
        self._heads: dict[str, Head] = {}

    def add(self, key: str, head: Head) -> str:
        """The key. ValueError where another head has it: targets that name it would be read through the wrong
        one.
        """
        if self._heads.setdefault(key, head) is not head:
            raise ValueError(f"there is an output head under the key '{key}' already, and it is another one")
        return key

    def remove(self, key: str) -> None:
        self._heads.pop(key, None)

    def __getitem__(self, key: str) -> Head:
        if key not in self._heads:
            known = ", ".join(sorted(self._heads)) or "none"
            raise ModelError(
                f"a target names the output head '{key}', and this process has no head of that name (it has "
                f"{known}). Hidden states can "
                f"be read only where the teacher that gave them is open: ask for log-probs there."
            )
        return self._heads[key]
