"""Which static shapes the batches of variable-length rows are padded to.

Notable: every distinct shape costs a compilation, and every padded cell costs time. Rows start in the
combination of smallest buckets that hold their arrays (source 64, target 32); combinations are then joined, the pair
first that adds the fewest padded cells, until there are at most so many and none has fewer rows
than a batch. Arrays of one length (tokens and their types) always share a bucket, so they add no combinations.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from fastlm.errors import UserError

Shape = tuple[int, ...]
_ALL_PAIRS = 64  # above, only the rarest combination is joined with any other: pairs grow with the square


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """Returns the buckets as a tuple.

    Raises:
      UserError: there are none, or they do not rise from at least 1.
    """
    lengths = tuple(buckets)
    if not lengths or lengths[0] < 1 or any(low >= high for low, high in itertools.pairwise(lengths)):
        raise UserError(f"buckets {lengths} must be rising lengths from 1 on, as in (32, 64, 128)")
    return lengths


def plan_shapes(
    lengths: np.ndarray, buckets: Sequence[int], *, most: int, smallest: int
) -> tuple[list[Shape], np.ndarray]:
    """Returns the shapes, in order, and the number of each row's shape.

    Args:
      lengths: [rows, arrays], none above the last bucket.
      buckets: Rising lengths.
      most: At most so many shapes, at least 1.
      smallest: Fewest rows of a shape, unless there is one shape only.

    Returns:
      Shapes, one length per array, and [rows] int64.
    """
    fitting = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
    unique, member, counts = np.unique(fitting, axis=0, return_inverse=True, return_counts=True)
    shapes = [tuple(shape) for shape in unique.tolist()]
    joined = _join(dict(zip(shapes, counts.tolist())), most, smallest)
    order = sorted(set(joined.values()))
    numbers = np.array([order.index(joined[shape]) for shape in shapes], np.int64)
    return order, numbers[member.reshape(-1)]


def _join(counts: dict[Shape, int], most: int, smallest: int) -> dict[Shape, Shape]:
    """Returns what each shape is joined to."""
    joined = {shape: shape for shape in counts}
    while len(counts) > 1:
        rarest = min(counts, key=lambda shape: (counts[shape], shape))
        if counts[rarest] >= smallest and len(counts) <= most:
            break
        if counts[rarest] < smallest or len(counts) > _ALL_PAIRS:
            pairs = [(rarest, other) for other in counts if other != rarest]
        else:
            pairs = list(itertools.combinations(sorted(counts), 2))
        pair = min(pairs, key=lambda pair: (_added_cells(*pair, counts), pair))
        union = tuple(map(max, *pair))
        counts[union] = sum(counts.pop(shape) for shape in {*pair, union} if shape in counts)
        joined = {shape: union if current in {*pair, union} else current for shape, current in joined.items()}
    return joined


def _added_cells(first: Shape, second: Shape, counts: dict[Shape, int]) -> int:
    union = sum(map(max, first, second))
    return counts[first] * (union - sum(first)) + counts[second] * (union - sum(second))
