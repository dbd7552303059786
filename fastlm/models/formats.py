"""In what form weights are: `ModelConfig.formats`, ordered (path pattern, format), of which the first that fits counts.

    low_rank(rank=R)   a product [I, R] [R, O] in the place of a matrix; the two are weights of their own
    sparse(ones=N)     a bit for each number, and the N that are not zero; on disk alone, what is read are arrays

Notable: `models.abstract` builds shapes and logical axes of leaves with what stands here, so that a checkpoint, its
placement, its optimizer's state, and whatever cuts or counts weights follow without knowing a format by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm import configuration
from fastlm.errors import UserError, nearest
from fastlm.ops import paths
from fastlm.ops.contract import dense
from fastlm.ops.leaf import Leaf
from fastlm.ops.leaves import LowRank, Sparse

Formats = tuple[tuple[str, str], ...]
Axes = tuple[str | None, ...]
Params = Mapping[str, Any]
WHERE = "config.model.formats"


class Format(Protocol):
    """A form of a matrix.

    Attributes:
      stored: whether it is for disk alone.
    """

    stored: ClassVar[bool]

    def of(self, w: Float[Array, "I O"]) -> Leaf:
        """Returns the leaf nearest to a matrix."""

    def axes(self, names: Axes) -> dict[str, Axes]:
        """Returns the logical axes of the leaf's parts by name."""


@dataclasses.dataclass(frozen=True)
class OfLowRank:
    """See `leaves.LowRank`; a matrix becomes its largest singular values, shared by both factors.

    Fresh models start so too, which trains better than random factors (arXiv 2105.01029).
    """

    rank: int
    stored: ClassVar[bool] = LowRank.stored

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"low_rank: rank must be at least 1, got {self.rank}")

    def of(self, w: Float[Array, "I O"]) -> LowRank:
        """Cuts the singular values behind the first `rank`; ranks that there are not stay zero."""
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[: self.rank])
        a, b = u[:, : self.rank] * root, root[:, None] * v[: self.rank]
        more = max(0, self.rank - s.size)
        return LowRank(jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), (0, 0))))

    def axes(self, names: Axes) -> dict[str, Axes]:
        """The rank is nobody's axis."""
        return {"a": (names[0], None), "b": (None, names[1])}


@dataclasses.dataclass(frozen=True)
class OfSparse:
    """See `leaves.Sparse`."""

    ones: int
    stored: ClassVar[bool] = Sparse.stored

    def __post_init__(self) -> None:
        if self.ones < 0:
            raise UserError(f"sparse: ones must not be negative, got {self.ones}")

    def of(self, w: Float[Array, "I O"]) -> Sparse:
        """Keeps the first `ones` numbers that are not zero."""
        return Sparse.of(w, self.ones)

    def axes(self, names: Axes) -> dict[str, Axes]:
        """Bits and values lie whole on each device."""
        del names
        return {"bits": (None,), "values": (None,)}


FORMATS: dict[str, type[Format]] = {"low_rank": OfLowRank, "sparse": OfSparse}


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Format:
    """Reads a format as a config has it.

    Raises:
      UserError: there is none such.
    """
    name, options = configuration.call(text, WHERE)
    if name not in FORMATS:
        raise UserError(f"{WHERE}: no format '{name}'{nearest(name, FORMATS)}; one of: {', '.join(FORMATS)}")
    return configuration.make(FORMATS[name], f"model.formats: {name}", options)


def by_path(formats: Formats, matrices: Mapping[str, Axes]) -> dict[str, Format]:
    """Returns the format of each matrix that has one, of those with these logical axes.

    Raises:
      UserError: a pattern selects no matrix.
    """
    found, used = {}, set()
    for path, names in matrices.items():
        for pattern, text in formats if len(names) == 2 else ():
            if paths.matches(pattern, path):
                found[path] = parse(text)
                used.add(pattern)
                break
    for pattern, _ in formats:
        if pattern not in used:
            paths.require_match(pattern, [path for path, names in matrices.items() if len(names) == 2], WHERE)
    return found


def applied(
    formats: Formats, params: Any, axes: Mapping[str, Axes], make: Callable[[Format, Any], Any]
) -> tuple[Any, dict[str, Axes]]:
    """Returns parameters and their logical axes with leaves in the place of matrices.

    Args:
      make: `(format, matrix) -> leaf`.
    """
    chosen = by_path(formats, axes)
    given = {}
    for path, names in axes.items():
        parts = chosen[path].axes(names) if path in chosen else {}
        given |= {f"{path}/{part}": own for part, own in parts.items()} or {path: names}
    put = lambda path, leaf: make(chosen[path], leaf) if path in chosen else leaf
    return paths.map_with_path(put, params), given


def text_of(form: Format) -> str:
    """Returns a format as a config has it."""
    name = next(name for name, kind in FORMATS.items() if isinstance(form, kind))
    return f"{name}({', '.join(f'{key}={value}' for key, value in dataclasses.asdict(form).items())})"


def opened(params: Any) -> Any:
    """Returns parameters with arrays in the place of leaves that are for disk alone."""
    return jax.tree.map(lambda leaf: dense(leaf) if _is_stored(leaf) else leaf, params, is_leaf=_is_stored)


def merged(params: Any) -> Any:
    """Returns parameters with arrays in the place of all leaves."""
    return jax.tree.map(dense, params, is_leaf=lambda node: isinstance(node, Leaf))


def for_use(formats: Formats) -> Formats:
    """Returns what is left of formats once a model is read (see `opened`)."""
    return tuple((pattern, text) for pattern, text in formats if not parse(text).stored)


def _is_stored(node: Any) -> bool:
    return isinstance(node, Leaf) and node.stored


def without_layers(formats: Mapping[str, Format], layers: Sequence[int]) -> Formats:
    """Returns the formats, by path, of the model that has these layers alone."""
    numbers = {str(i): str(n) for n, i in enumerate(layers)}
    kept = []
    for path, form in formats.items():
        first, _, rest = path.partition("/")
        number, _, inside = rest.partition("/")
        if first != "layers":
            kept.append((path, text_of(form)))
        elif number in numbers:
            kept.append((f"layers/{numbers[number]}/{inside}", text_of(form)))
    return tuple(kept)
