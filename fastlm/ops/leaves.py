"""The classes of leaves.

Adapted: a weight that stays, plus a product of two thin matrices that learns (LoRA, arXiv 2106.09685).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.leaf import Leaf


@flax.struct.dataclass
class Adapted(Leaf):
    """base + scale * a @ b.

    Attributes:
      base: an array or another leaf.
      a, b: [I, R] and [R, O].
    """

    base: Any
    a: Float[Array, "I R"]
    b: Float[Array, "R O"]
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return tuple(self.base.shape)

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Adds what the thin matrices say; the sum of the two is never stored."""
        first, second = (self.b, self.a) if transpose else (self.a, self.b)
        y = contract(contract(x, first, transpose=transpose), second, transpose=transpose, dtype=dtype)
        return contract(x, self.base, transpose=transpose, dtype=dtype) + self.scale * y

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Adds the rows of the product."""
        rows = contract(lookup(self.a, ids, dtype), self.b, dtype=dtype)
        return lookup(self.base, ids, dtype, axes) + self.scale * rows

    def dense(self) -> Array:
        """Returns the sum as one array, in float32."""
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        return dense(self.base) + self.scale * product
