"""Sizes computed from numbers nobody has checked."""

import math
from collections.abc import Sequence

_MAX_DIMENSIONS = 32  # numpy before 2.0 stops here, and no weight has more
_MAX_BYTES = 2**63 - 1


def array_bytes(shape: Sequence[int], block_elements: int, block_bytes: int) -> int | None:
    """Returns the bytes of an array of this shape, or None if no array can have it.

    A length of 0 does not hide the others: numpy refuses (0, 2**62, 2**62) as well. Blocks run along the
    last axis, whose length must be a multiple of `block_elements`.
    """
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= length <= _MAX_BYTES for length in shape):
        return None
    last = shape[-1] if shape else 1
    # Eight bytes an element is the most that reading makes of any stored type.
    if last % block_elements or math.prod(max(length, 1) for length in shape) * 8 > _MAX_BYTES:
        return None
    return math.prod(shape) // block_elements * block_bytes
