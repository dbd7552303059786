"""What a model does on a little data, of each of its matrices: how large inputs are, and what the loss says of weights.

Notable: one backward pass gives all of it, of any task. Inputs of a product are read by a gradient too: `Probed` stands
in the place of a matrix and hands its input on as it is, and the "gradient" of its probe is what that input adds up to.
Rows that the loss does not depend on (padding, words that nothing reads) have a gradient of zero and are not counted.
Left out: tables, which are looked up and not multiplied.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.errors import UserError
from fastlm.ops import paths
from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.leaf import Leaf, is_whole
from fastlm.tasks.task import Task

GRADIENT, ABSOLUTE, SQUARE = "gradient", "absolute", "square"
INPUTS, PRODUCTS, OUTPUTS = "inputs", "products", "outputs"


@flax.struct.dataclass
class Evidence:
    """Of one matrix [I, O]; None for what was not asked for.

    Attributes:
      gradient: of the mean loss.
      absolute: mean over batches of what the gradient of each is in size.
      square: the loss's curvature by the empirical Fisher information: mean over batches of the squared gradient of
        each, times what its loss counts (gradients of single predictions add up like noise).
      inputs: mean square of each input.
      products: mean product of each input with each.
      outputs: the loss's curvature by what comes out of the product: mean over batches of the summed products of the
        gradients of each with each, times what the loss counts (one factor of arXiv 1503.05671's approximation of
        Fisher's information, `products` is the other).
    """

    gradient: Float[Array, "I O"] | None = None
    absolute: Float[Array, "I O"] | None = None
    square: Float[Array, "I O"] | None = None
    inputs: Float[Array, "I"] | None = None
    products: Float[Array, "I I"] | None = None
    outputs: Float[Array, "O O"] | None = None


@flax.struct.dataclass
class Probed(Leaf):
    """A matrix whose inputs are read.

    Attributes:
      probe: zeros; its gradient is the sum of squares [I] (or of products [I, I]) of the inputs, and their count; None
        for nothing of them.
      outward: zeros [O, O]; its gradient is the sum of products of the gradients of what comes out; None for nothing.
    """

    base: Any
    probe: tuple[Array, Array] | None
    outward: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return tuple(self.base.shape)

    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Multiplies as the base does."""
        read = x if self.probe is None else _read(x, self.probe)
        y = contract(read, self.base, transpose=transpose, dtype=dtype)
        return y if self.outward is None else _answered(y, self.outward)

    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Looks up as the base does."""
        return lookup(self.base, ids, dtype, axes)

    def dense(self) -> Array:
        """Returns the base as one array."""
        return dense(self.base)


@jax.custom_vjp
def _read(x: Array, probe: tuple[Array, Array]) -> Array:
    return x


def _read_backward(residuals: tuple[Array, tuple[Array, Array]], g: Array) -> tuple[Array, tuple[Array, Array]]:
    x, (total, count) = residuals
    counted = jnp.any(g != 0, axis=-1).reshape(-1)
    rows = jnp.where(counted[:, None], x.reshape(-1, x.shape[-1]).astype(jnp.float32), 0.0)
    if total.ndim == 1:
        found = jnp.sum(jnp.square(rows), axis=0)
    else:
        found = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return g, (found.astype(total.dtype), jnp.sum(counted).astype(count.dtype))


_read.defvjp(lambda x, probe: (x, (x, probe)), _read_backward)


@jax.custom_vjp
def _answered(y: Array, outward: Array) -> Array:
    return y


def _answered_backward(outward: Array, g: Array) -> tuple[Array, Array]:
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return g, jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


_answered.defvjp(lambda y, outward: (y, outward), _answered_backward)


def gather(
    task: Task,
    params: Any,
    batches: Iterable[Mapping[str, Array]],
    matrices: Collection[str],
    wanted: Collection[str],
    *,
    compression: Any = None,
) -> dict[str, Evidence]:
    """Reads batches, and returns what was wanted of these matrices by their paths within the model.

    Args:
      params: trainables of the task, the model's own under "model".
      matrices: paths such as "layers/0/attention/q".
      wanted: names of `Evidence`'s attributes.
      compression: the state of the task's compression; None makes a fresh one.

    Raises:
      UserError: no batch, or none that the loss counts anything in.
    """
    state = task.compression.init(params) if compression is None else compression
    read = functools.partial(_read_batch, task, frozenset(matrices), frozenset(wanted))
    add = jax.jit(lambda sums, *given: jax.tree.map(jnp.add, sums, read(*given)), donate_argnums=0)
    sums, used = None, 0
    for batch in batches:
        if sums is None:
            shapes = jax.eval_shape(read, params, state, batch)
            sums = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        sums, used = add(sums, params, state, batch), used + 1
    if not used or not float(sums[1]) > 0:
        raise UserError("calibration: the data has nothing that the loss counts; give longer texts, or more of them")
    return _means(sums[0], used)


def _read_batch(task: Task, matrices: frozenset, wanted: frozenset, params: Any, state: Any, batch: Any) -> Any:
    """Returns (sums by path, the count of the loss) of one batch."""
    step, rows = jnp.zeros((), jnp.int32), len(next(iter(batch.values())))
    weights = task.compression.view(params, task.constants, state, step, None)
    batch = task.prepare(weights, task.constants, batch, step, None)
    own = {path: leaf for path, leaf in paths.flatten(weights["model"], is_leaf=is_whole).items() if path in matrices}
    reads = wanted & {INPUTS, PRODUCTS}
    size = lambda leaf: (leaf.shape[0],) * (2 if PRODUCTS in reads else 1)
    probes = {path: (jnp.zeros(size(leaf)), jnp.zeros(())) for path, leaf in own.items()} if reads else {}
    answers = {path: jnp.zeros((leaf.shape[1],) * 2) for path, leaf in own.items()} if OUTPUTS in wanted else {}
    gradients = wanted & {GRADIENT, ABSOLUTE, SQUARE}
    arrays = {path: dense(leaf) for path, leaf in own.items()} if gradients else {}

    def loss(arrays: dict[str, Array], probes: dict[str, Any], answers: dict[str, Array]) -> tuple[Array, Array]:
        def put(path: str, leaf: Any) -> Any:
            leaf = arrays.get(path, leaf)
            probed = path in probes or path in answers
            return Probed(leaf, probes.get(path), answers.get(path)) if probed else leaf

        seen = {**weights, "model": paths.map_with_path(put, weights["model"], is_leaf=is_whole)}
        total, count, _ = task.loss(seen, task.constants, task.carry(rows), batch, step, None)
        return total / jnp.maximum(count, 1), count

    found = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(arrays, probes, answers)
    (of_arrays, of_probes, of_answers), count = found
    found: dict[str, dict[str, Any]] = {path: {} for path in own}
    forms = {GRADIENT: lambda g: g, ABSOLUTE: jnp.abs, SQUARE: lambda g: count * jnp.square(g)}
    for path, g in of_arrays.items():
        found[path] |= {name: form(g) for name, form in forms.items() if name in gradients}
    for path, read in of_probes.items():
        found[path] |= {PRODUCTS if PRODUCTS in reads else INPUTS: read}
    for path, answer in of_answers.items():
        found[path] |= {OUTPUTS: count * answer}
    return found, count


def _means(sums: Mapping[str, dict[str, Any]], batches: int) -> dict[str, Evidence]:
    found = {}
    for path, parts in sums.items():
        mean = {name: parts[name] / batches for name in (GRADIENT, ABSOLUTE, SQUARE, OUTPUTS) if name in parts}
        for name in (INPUTS, PRODUCTS):
            if name in parts:
                total, count = parts[name]
                mean[name] = total / jnp.maximum(count, 1)
        if PRODUCTS in mean:
            mean[INPUTS] = jnp.diagonal(mean[PRODUCTS])
        found[path] = Evidence(**mean)
    return found
