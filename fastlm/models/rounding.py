"""Weights in eight bits while a model writes: a rewrite of its parameters, which models and decoders do not notice.

Every matrix that is large enough to cost something becomes an `ops.leaves.Rounded`: a quarter of the bytes, and on a
CPU no slower than float32. Norms, biases, small matrices and tables of positions stay as they are.
Left out: checkpoints of rounded weights, weights cut over devices, fewer bits, and anything that makes up for the
rounding.
"""

from typing import Any

import jax

from fastlm.ops import paths
from fastlm.ops.leaves import Rounded

LEAST = 1 << 14  # numbers of a matrix that is rounded


def round_weights(params: Any, least: int = LEAST) -> Any:
    """Returns the parameters with their large matrices in eight bits."""

    def one(path: str, leaf: jax.Array) -> jax.Array | Rounded:
        if leaf.ndim != 2 or leaf.size < least or paths.matches("positions", path):
            return leaf
        return Rounded.of(leaf, table=paths.matches("table", path))

    return paths.map_with_path(one, params)
