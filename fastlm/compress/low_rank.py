"""Two thin matrices in the place of one: by singular values, of the matrix or of what it does to the inputs it sees.

    svd        the nearest matrix of that rank
    scaled     the same once each row is scaled by how large its input is (after ASVD, arXiv 2312.05821)
    whitened   the matrix of that rank whose outputs are nearest, on the inputs seen (SVD-LLM, 2403.07378)
    fisher     the same, where those outputs count most that the loss depends on most: the nearest by the loss's
               curvature, inputs and gradients of outputs taken as independent (1503.05671)

Notable: a method is square roots of what is known of the inputs, and of the outputs: factors are those of the matrix
between its roots, which are taken off again. `whitened` is exact least squares. Squares of singular values say what
each costs: of `whitened` in squares of the output, of `fisher` in loss, so that matrices can be compared. Roots are
made of eigenvectors: inputs that do not occur, or fewer rows than inputs, are no trouble as they are for Cholesky's.
A matrix is left whole where two thin ones would not be smaller by `WORTH`: two small products take longer than one of
as many numbers.
Left out: shared bases over layers, updates of what follows a factorised layer; recovery is training as any.

Dims: I inputs, O outputs, R rank.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastlm.compress.evidence import INPUTS, OUTPUTS, PRODUCTS, Evidence
from fastlm.errors import UserError, nearest
from fastlm.models import ModelConfig, formats
from fastlm.ops import paths
from fastlm.ops.leaves import LowRank

WORTH = 0.9  # share of a matrix's numbers from which on two thin ones are not worth it
LEAST = 1e-7  # of the largest eigenvalue: what is less is as large for the inverse

Spectra = Mapping[str, Float[np.ndarray, "min(I,O)"]]
Sides = Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Root:
    """A square root of what is known of the inputs of a matrix.

    Attributes:
      put, off: `[I, n] -> [I, n]`, one undoes the other.
    """

    put: Callable[[Array], Array] = lambda w: w
    off: Callable[[Array], Array] = lambda w: w


def _scaled(inputs: Float[Array, "I"]) -> Root:
    size = jnp.sqrt(jnp.maximum(inputs, LEAST * jnp.max(inputs)))[:, None]
    return Root(lambda w: size * w, lambda w: w / size)


def _whitened(products: Float[Array, "I I"]) -> Root:
    values, vectors = jnp.linalg.eigh(products)
    size = jnp.sqrt(jnp.maximum(values, LEAST * values[-1]))[:, None]
    times = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return Root(lambda w: size * times(vectors.T, w), lambda w: times(vectors, w / size))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to factorise.

    Attributes:
      roots: of what was seen, on the side of the inputs and of the outputs.
      needs: which attributes of `Evidence` it looks at.
    """

    roots: Callable[[Evidence], tuple[Root, Root]]
    needs: tuple[str, ...] = ()


METHODS = {
    "svd": Method(lambda seen: (Root(), Root())),
    "scaled": Method(lambda seen: (_scaled(seen.inputs), Root()), (INPUTS,)),
    "whitened": Method(lambda seen: (_whitened(seen.products), Root()), (PRODUCTS,)),
    "fisher": Method(lambda seen: (_whitened(seen.products), _whitened(seen.outputs)), (PRODUCTS, OUTPUTS)),
}


def method(name: str, where: str) -> Method:
    """Finds a method.

    Raises:
      UserError: there is none of this name.
    """
    if name not in METHODS:
        raise UserError(f"{where}: no method '{name}'{nearest(name, METHODS)}; one of: {', '.join(METHODS)}")
    return METHODS[name]


def factors(w: Float[Array, "I O"], seen: Evidence, name: str) -> tuple[LowRank, Float[Array, "min(I,O)"]]:
    """Returns the factors of full rank, the largest singular value first, and the singular values.

    Whatever rank is kept, the first columns of one and rows of the other are the factors of it (`cut`).
    """
    inward, outward = METHODS[name].roots(seen)
    u, s, v = jnp.linalg.svd(outward.put(inward.put(w.astype(jnp.float32)).T).T, full_matrices=False)
    size = jnp.sqrt(s)
    return LowRank(inward.off(u) * size, size[:, None] * outward.off(v.T).T), s


def cut(leaf: LowRank, rank: int) -> LowRank:
    """Returns the first `rank` of the factors of full rank."""
    return LowRank(leaf.a[:, :rank], leaf.b[:rank])


# --- ranks ------------------------------------------------------------------------------------------


def uniform(spectra: Spectra, sides: Sides, budget: float, multiple: int) -> dict[str, int]:
    """The same share of each matrix."""
    del spectra
    share = budget / sum(i * o for i, o in sides.values())
    steps = {path: int(share * i * o / (i + o) / multiple + 1e-9) for path, (i, o) in sides.items()}
    return {path: max(count, 1) * multiple for path, count in steps.items()}


def by_energy(spectra: Spectra, sides: Sides, budget: float, multiple: int) -> dict[str, int]:
    """Singular values one after the other, those first that say most of their own matrix for what they cost."""
    own = {path: s / max(np.linalg.norm(np.asarray(s, np.float64)), 1e-30) for path, s in spectra.items()}
    return by_size(own, sides, budget, multiple)


def by_size(spectra: Spectra, sides: Sides, budget: float, multiple: int) -> dict[str, int]:
    """Singular values one after the other, those first that are largest for what they cost: of "fisher" by loss."""
    gains, costs, owners = [], [], []
    for path, s in spectra.items():
        blocks = np.add.reduceat(np.square(np.asarray(s, np.float64)), np.arange(0, len(s), multiple))
        cost = multiple * sum(sides[path])
        gains.append(blocks / cost)
        gains[-1][0] = np.inf  # each has some rank
        costs.append(np.full(len(blocks), cost))
        owners += [path] * len(blocks)
    order = np.argsort(-np.concatenate(gains), kind="stable")
    taken = order[np.cumsum(np.concatenate(costs)[order]) <= budget]
    return {path: max(1, sum(owners[place] == path for place in taken)) * multiple for path in spectra}


ALLOCATIONS: dict[str, Callable[[Spectra, Sides, float, int], dict[str, int]]] = {
    "uniform": uniform,
    "energy": by_energy,
    "size": by_size,
}


def ranks(spectra: Spectra, sides: Sides, share: float, allocation: str, multiple: int = 1) -> dict[str, int]:
    """Returns the rank of each matrix that is worth factorising; the others stay whole.

    Matrices that stay whole are paid from the budget, and the rest is allocated again.

    Args:
      share: of all numbers of these matrices, that may be left.
      multiple: of which ranks are multiples.

    Raises:
      UserError: the share is less than ranks of one multiple take; says the least.
    """
    size = lambda paths: sum(math.prod(sides[path]) for path in paths)
    budget, whole = share * size(sides), set[str]()
    least = sum(multiple * sum(sides[path]) for path in sides)
    if budget < least:
        raise UserError(
            f"--share: {share} of {size(sides):,} numbers is less than ranks of {multiple} take; give at least "
            f"{math.ceil(1000 * least / size(sides)) / 1000}, or a smaller --multiple"
        )
    while True:
        left = {path: side for path, side in sides.items() if path not in whole}
        given = {path: spectra[path] for path in left}
        found = ALLOCATIONS[allocation](given, left, budget - size(whole), multiple) if left else {}
        most = {path: int(WORTH * i * o / (i + o) / multiple) * multiple for path, (i, o) in left.items()}
        more = {path for path in left if found[path] > most[path]}
        fixed = whole | more
        if not more or size(fixed) + sum(multiple * sum(sides[path]) for path in left if path not in more) > budget:
            return {path: min(found[path], most[path]) for path in left if most[path]}
        whole = fixed


def with_ranks(
    cfg: ModelConfig, params: Any, full: Mapping[str, LowRank], chosen: Mapping[str, int]
) -> tuple[ModelConfig, Any]:
    """Returns the model with factors of these ranks in the place of its matrices.

    Args:
      full: `factors` of each.
    """
    own = tuple((path, formats.text_of(formats.OfLowRank(rank))) for path, rank in chosen.items())
    put = lambda path, leaf: cut(full[path], chosen[path]) if path in chosen else leaf
    return dataclasses.replace(cfg, formats=own + cfg.formats), paths.map_with_path(put, params)
