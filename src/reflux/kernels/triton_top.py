"""The largest numbers of each row of a wide matrix, by a Triton kernel that reads the matrix twice.

A lane's maximum is one number of the row. So the k-th largest of the lanes' maxima is at most the k-th
largest number of the row, and few numbers lie above it. They are written into a short list, from which torch
chooses. Importing this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _keys(x_ptr: tl.tensor, stride: int, filled: int, columns: tl.tensor, width: int) -> tl.tensor:
    """One block of this program's row as int32 in the order of the floats. NaN is the largest, and the lowest
    int32 stands beyond the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < filled, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(columns < width, keys, -2147483648)


@triton.jit
def _numbers(x_ptr: tl.tensor, stride: int, filled: int, columns: tl.tensor, width: int) -> tl.tensor:
    """The same as int64 that all differ: key 2^32 + (2^32 - 1 - column), so that of equal keys the first one
    is the largest. Beyond the end of the row they are less than any inside.
    """
    keys = _keys(x_ptr, stride, filled, columns, width)
    return keys.to(tl.int64) * 4294967296 + (4294967295 - columns.to(tl.int64))


@triton.jit
def _reached(
    x_ptr: tl.tensor, stride: int, filled: int, width: int, low: int, BLOCK: tl.constexpr
) -> tl.tensor:
    """How many numbers of the row are `low` or more."""
    lanes = tl.arange(0, BLOCK)
    reached = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, width, BLOCK):
        reached += (_numbers(x_ptr, stride, filled, start + lanes, width) >= low).to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def _collect(
    x_ptr: tl.tensor,
    stride: int,
    filled: int,
    found_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    width: int,
    low: int,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Write the row's numbers of `low` or more into its list, as far as it has room, and return how many
    there are. Their order in the list may differ from run to run.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    nobody = tl.full([BLOCK], 0, tl.int32)
    reached = nobody
    for start in range(0, width, BLOCK):
        numbers = _numbers(x_ptr, stride, filled, start + lanes, width)
        hit = numbers >= low
        place = tl.atomic_add(counts_ptr + row + nobody, 1, mask=hit)
        tl.store(found_ptr + row * ROOM + place, numbers, mask=hit & (place < ROOM))
        reached += hit.to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def row_candidates(
    x_ptr: tl.tensor,
    stride: int,
    filled: int,
    found_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    width: int,
    k: int,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write into found_ptr [rows, ROOM] the k largest of the row's `_numbers` and some others, and leave the
    rest of the list as it is: the lowest int64. counts_ptr [rows] holds zeros.

    k is at most ROOM, BLOCK and the width. If too many numbers lie above the first bound, as with equal
    logits, further loops over the row raise it.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -2147483648, tl.int32)
    for start in range(0, width, BLOCK):
        top = tl.maximum(top, _keys(x_ptr, stride, filled, start + lanes, width))
    peak = tl.max(top, 0).to(tl.int64)
    # the largest bound that at least k lanes reach
    low = tl.min(top, 0).to(tl.int64)
    high = peak
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((top >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    # the least number with this key
    low = low * 4294967296 + 4294967296 - width
    many = _collect(x_ptr, stride, filled, found_ptr, counts_ptr, width, low, ROOM, BLOCK)
    if many > ROOM:
        high = peak * 4294967296 + 4294967295
        # At the k-th largest number the loop has ended, because the numbers differ.
        while many > ROOM:
            # half the sum, rounded up: the sum itself may exceed 64 bits
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
            more = _reached(x_ptr, stride, filled, width, middle, BLOCK)
            many = tl.where(more >= k, more, many)
            low = tl.where(more >= k, middle, low)
            high = tl.where(more >= k, high, middle - 1)
        # Begin the list anew.
        tl.debug_barrier()
        places = tl.arange(0, ROOM)
        tl.store(found_ptr + row * ROOM + places, tl.full([ROOM], -9223372036854775808, tl.int64))
        tl.store(counts_ptr + row, 0)
        tl.debug_barrier()
        _collect(x_ptr, stride, filled, found_ptr, counts_ptr, width, low, ROOM, BLOCK)
