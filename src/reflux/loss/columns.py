"""By-products of a pass, one value per row."""

from __future__ import annotations

from torch import Tensor


class Columns(dict[str, Tensor]):
    """Name -> one detached tensor for all rows. It is allocated at the first block and filled block by
    block.

    Small tensors kept from each block would lie on the heap between the block's large temporaries. The C
    library could then not merge and reuse the memory of these temporaries, which are gigabytes at a large
    vocabulary.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def put(self, name: str, rows: slice, column: Tensor) -> None:
        if name not in self:
            self[name] = column.new_empty((self.rows, *column.shape[1:]))
        self[name][rows] = column.detach()
