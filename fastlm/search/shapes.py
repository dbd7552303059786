"""The shapes that can be sliced out of a model, and what they have, counted without making them.

Notable: every parameter's size is a product of what its axes count (`models.units`), so the parameters of a shape are
a sum of a few products; that `models.abstract` says the same is tested.
Left out: shapes whose layers differ where the model's do not.
"""

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastlm.compress.parts import Part, heads_of
from fastlm.errors import UserError
from fastlm.models import LayerConfig, ModelConfig, abstract, slicing, units
from fastlm.ops import paths

LEAST = 8  # a shape has at least one 8th of the width and feed-forward width
Terms = tuple[tuple[tuple[bool, tuple[str, ...]], int], ...]  # ((outside of embeddings?, kinds of units), entries)


class Shape(NamedTuple):
    """Sizes of a student; `layers` are those of the only, or the decoder's, stack."""

    layers: int
    encoder_layers: int
    width: int
    heads: int
    feed_forward_width: int


def layers_of(cfg: ModelConfig, layers: int, encoder_layers: int) -> tuple[int, ...]:
    """Returns the numbers of so many layers of each stack, evenly spaced."""
    encoder = slicing.evenly(encoder_layers, cfg.encoder_layers) if encoder_layers else ()
    return encoder + tuple(i + cfg.encoder_layers for i in slicing.evenly(layers, cfg.layers))


def parameters_of(cfg: ModelConfig) -> tuple[int, int]:
    """Returns how many parameters there are, and how many of them outside of embeddings and vocabulary."""
    by_path = {path: leaf.size for path, leaf in paths.flatten(abstract(cfg)[0]).items()}
    return sum(by_path.values()), sum(size for path, size in by_path.items() if _is_inner(cfg, path))


def _is_inner(cfg: ModelConfig, path: str) -> bool:
    return "vocab" not in abstract(cfg)[1][path] and "embedding" not in path.split("/")[:2]


class Sizes:
    """What the parts of a model have.

    Attributes:
      total, inner: parameters of the whole, and those outside of embeddings and vocabulary.
      least_work: the least share of its FLOPs that a shape can take.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg, (self.total, self.inner) = cfg, parameters_of(cfg)
        leaves, counts = paths.flatten(abstract(cfg)[0]), units.counts(cfg)
        terms: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
        for path, names in units.axes(cfg).items():
            layer = int(path.split("/")[1]) if path.startswith("layers/") else -1
            kinds = tuple(sorted(unit.kind for unit in names if unit is not None))
            entries = (size // (counts[unit] if unit else 1) for size, unit in zip(leaves[path].shape, names))
            terms[layer][_is_inner(cfg, path), kinds] += math.prod(entries)
        self._layers: list[tuple[LayerConfig, Terms]] = [
            (cfg.layer(i), tuple(terms[i].items())) for i in range(cfg.total_layers)
        ]
        self._shared = cfg.layer(cfg.stack[0]), tuple(terms[-1].items())
        self._head = cfg.vocab_size if cfg.head in ("language_model", "masked_language_model") else 0
        self._whole = self._work(self.inner, cfg.width)
        ((_, self.least_work),) = self.of(shapes(cfg)[-1:])

    def _work(self, inner: int, width: int) -> int:
        return inner + self._head * width

    def of(self, chosen: Sequence[Shape]) -> Iterator[tuple[int, float]]:
        """Yields the parameters of each shape, and about which share of the teacher's FLOPs it takes."""
        kept: dict[tuple[int, int], collections.Counter] = {}
        for shape in chosen:
            depth = shape.layers, shape.encoder_layers
            if depth not in kept:
                kept[depth] = collections.Counter(self._layers[i] for i in layers_of(self.cfg, *depth))
                kept[depth][self._shared] += 1
            total = inner = 0
            for (layer, terms), times in kept[depth].items():
                heads, kv_heads = heads_of(layer, shape.heads)
                own = min(shape.feed_forward_width, layer.feed_forward_width)
                size = {"hidden": shape.width, "heads": heads, "kv_heads": kv_heads, "feed_forward": own}
                for (is_inner, kinds), entries in terms:
                    found = times * entries * math.prod(size[kind] for kind in kinds)
                    total += found
                    inner += found if is_inner else 0
            yield total, self._work(inner, shape.width) / self._whole


@functools.lru_cache(maxsize=4)
def shapes(cfg: ModelConfig) -> list[Shape]:
    """Returns all shapes but the model's own, the largest first, heads as wide as they are.

    Raises:
      UserError: there is none.
    """
    layers = [cfg.layer(i) for i in range(cfg.total_layers)]
    heads, mlp = (max(getattr(layer, key) for layer in layers) for key in ("heads", "feed_forward_width"))
    dim = layers[0].head_dim
    one_of_each = slicing.of_layers(cfg, sorted({layer: i for i, layer in reversed(list(enumerate(layers)))}.values()))
    possible = lambda key: lambda size: _possible(one_of_each, Part(**{key: size}))
    widths = [n for n in _down(cfg.width, 8 if cfg.width % dim else dim) if n == cfg.width or possible("width")(n)]
    counts = [n for n in range(heads, 0, -1) if n == heads or possible("heads")(n)]
    depths = [
        (n, max(1, round(cfg.encoder_layers * n / cfg.layers)) if cfg.encoder_layers else 0)
        for n in range(cfg.layers, 0, -1)
    ]
    sizes = _down(mlp, 64 if mlp >= 512 else 8)
    every = [Shape(*depth, width, n, size) for depth in depths for width in widths for n in counts for size in sizes]
    if len(every) == 1:
        raise UserError("nothing of this model can be sliced: it has one layer, and sizes that have to stay")
    return every[1:]


def _down(size: int, step: int) -> list[int]:
    """Returns `size`, and the multiples of `step` below it that are not too small."""
    return [size, *(n for n in range((size - 1) // step * step, 0, -step) if n * LEAST >= size)]


def _possible(cfg: ModelConfig, part: Part) -> bool:
    try:
        part.config(cfg)
    except UserError:
        return False
    return True
