"""The classes of leaves.

Adapted: a weight that stays, plus a product of two thin matrices that learns (LoRA, arXiv 2106.09685).
Rounded: eight bits a number, widened a tile at a time while it multiplies.
LowRank: a product of two thin matrices in the place of one.
Columns: weights that multiply the same input, side by side.
Sparse: a bit for each number and those that are not zero: how zeros are kept on disk.
"""

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.leaf import Leaf
from fastlm.ops.rounding import rounded
from fastlm.parallel.platforms import target_platform

FEW = 64  # rows that a product by tiles is for
WIDTH, TILE = 64, 1 << 16  # outputs of a tile are a multiple of one, its numbers at most the other where they can be


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


@flax.struct.dataclass
class Rounded(Leaf):
    """levels * scales: eight bits a number, and a scale for each output (of a table: for each row).

    XLA:CPU has no fast product of 8-bit numbers, and widens a whole matrix, in memory, before it multiplies; in a loop
    it even does so once for all turns. So a few rows, as decoding has them, are multiplied by tiles of outputs, one
    after the other, each widened where the cache holds it: memory gives a quarter of the bytes, and nothing larger than
    a tile is made. Many rows, and other platforms, have one product.

    Attributes:
      levels: C tiles of t outputs; the last may have more than there are.
      scales: of each output; of a table that is a row.
      table: whether it is a table [O, I], not a matrix [I, O]. Static.
    """

    levels: Int[Array, "C I t"]
    scales: Float[Array, "O"]
    table: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, w: Array, table: bool = False) -> "Rounded":
        """Rounds a matrix [I, O], or a table [O, I], to the nearest of 255 levels for each output."""
        by_output = w if table else w.T
        outputs, inputs = by_output.shape
        levels, scales = rounded(by_output)
        size = min(WIDTH * max(TILE // (inputs * WIDTH), 1), outputs)
        levels = jnp.pad(levels, ((0, -outputs % size), (0, 0))).reshape(-1, size, inputs)
        return cls(jnp.swapaxes(levels, 1, 2), scales[:, 0], table)

    @property
    def shape(self) -> tuple[int, ...]:
        """[I, O], or [O, I] of a table."""
        outputs, inputs = self.scales.shape[0], self.levels.shape[1]
        return (outputs, inputs) if self.table else (inputs, outputs)

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Multiplies by outputs, which is what it is made for; the other way round it is widened."""
        if transpose != self.table:
            return contract(x, self.dense(), transpose=transpose, dtype=dtype)
        cpu = target_platform() == "cpu"
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32 if cpu else x.dtype)
        product = lambda levels: jnp.matmul(rows, levels.astype(rows.dtype), preferred_element_type=jnp.float32)
        if cpu and rows.shape[0] <= FEW:
            y = jnp.swapaxes(jax.lax.map(product, self.levels), 0, 1).reshape(rows.shape[0], -1)
        else:
            y = product(jnp.swapaxes(self.levels, 0, 1).reshape(rows.shape[1], -1))
        y = y[:, : self.scales.shape[0]] * self.scales
        return y.astype(dtype).reshape(*x.shape[:-1], -1)

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Widens the rows `ids`."""
        del axes
        if not self.table:
            return lookup(self.dense(), ids, dtype)
        ids = jnp.clip(ids, 0, self.scales.shape[0] - 1)
        tile, place = jnp.divmod(ids, self.levels.shape[2])
        levels = self.levels[tile, :, place]
        return (levels * self.scales[ids][..., None]).astype(dtype)

    def dense(self) -> Array:
        """Returns the numbers it stands for, in float32."""
        by_output = jnp.swapaxes(self.levels, 1, 2).reshape(-1, self.levels.shape[1])
        w = by_output[: self.scales.shape[0]] * self.scales[:, None]
        return w if self.table else w.T


@flax.struct.dataclass
class LowRank(Leaf):
    """a @ b. Its parts are weights like others: arrays, or leaves.

    Attributes:
      a, b: [I, R] and [R, O].
    """

    factored: ClassVar[bool] = True
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[I, O]."""
        return (self.a.shape[0], self.b.shape[1])

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Multiplies by one, then by the other; what lies between has R numbers and the type of `x`."""
        first, second = (self.b, self.a) if transpose else (self.a, self.b)
        return contract(contract(x, first, transpose=transpose), second, transpose=transpose, dtype=dtype)

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Multiplies the rows of the first by the second."""
        return contract(lookup(self.a, ids, dtype, (axes[0], None)), self.b, dtype=dtype)

    def dense(self) -> Array:
        """Returns the product as one array, in float32."""
        return jnp.matmul(dense(self.a), dense(self.b), precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class Columns(Leaf):
    """Weights [I, ...] side by side, each in its own form.

    Attributes:
      parts: arrays or leaves.
    """

    factored: ClassVar[bool] = True
    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """[I, all outputs]."""
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Returns the products side by side; transposed, one array is made first."""
        if transpose:
            return contract(x, self.dense(), transpose=True, dtype=dtype)
        return jnp.concatenate([contract(x, part, dtype=dtype) for part in self.parts], axis=-1)

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Returns the rows of all parts side by side."""
        return jnp.concatenate([lookup(part, ids, dtype, axes) for part in self.parts], axis=-1)

    def dense(self) -> Array:
        """Returns them as one array."""
        return jnp.concatenate([dense(part) for part in self.parts], axis=-1)


@flax.struct.dataclass
class Sparse(Leaf):
    """A bit for each number, row after row, and the numbers that are not zero in that order.

    For storage: no backend of XLA multiplies it faster than the array it stands for, which is made whenever it is used.

    Attributes:
      bits: the first number is the highest bit of the first byte, as `jnp.packbits` has them.
      values: those whose bit is 1; more are ignored.
      sides: (I, O). Static.
    """

    stored: ClassVar[bool] = True
    bits: Int[Array, "b"]
    values: Float[Array, "n"]
    sides: tuple[int, int] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, w: Array, ones: int) -> "Sparse":
        """Keeps the first `ones` of the numbers that are not zero: all, where there are no more."""
        flat = w.reshape(-1)
        there = (flat != 0) & (jnp.cumsum(flat != 0) <= ones)
        (places,) = jnp.nonzero(there, size=ones, fill_value=0)
        return cls(jnp.packbits(there), flat[places], (w.shape[0], w.shape[1]))

    @property
    def shape(self) -> tuple[int, ...]:
        """(I, O)."""
        return self.sides

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Multiplies by the array."""
        return contract(x, self.dense(), transpose=transpose, dtype=dtype)

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Reads the array."""
        return lookup(self.dense(), ids, dtype, axes)

    def dense(self) -> Array:
        """Returns the array."""
        there = jnp.unpackbits(self.bits)[: self.sides[0] * self.sides[1]].astype(bool)
        if not self.values.size:
            return jnp.zeros(self.sides, self.values.dtype)
        numbers = jnp.take(self.values, jnp.cumsum(there) - 1, mode="clip")
        return jnp.where(there, numbers, 0).reshape(self.sides)
