"""By-products of a pass, row by row."""

from __future__ import annotations

from torch import Tensor


class Columns(dict[str, Tensor]):
    """Name -> one tensor for all rows, made at the first block and filled block by block, detached.

    Small tensors kept from each block would do, but they would lie on the heap between the block's large
    temporaries, whose memory the C library could then not join and use again: gigabytes, at a large
    vocabulary.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def put(self, name: str, rows: slice, column: Tensor) -> None:
        if name not in self:
            self[name] = column.new_empty((self.rows, *column.shape[1:]))
        self[name][rows] = column.detach()
