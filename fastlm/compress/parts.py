"""The part of a trained model that a smaller one starts from: some of its layers, some of their width.

Notable: what a part will be (`config`) is known from the architecture alone; which units it has (`take`), from the
weights. Layers are named in words, see `layers_named`; units are those with the highest scores, by default those that
`importance.magnitude` finds largest.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastlm.compress import importance
from fastlm.compress.importance import Scores
from fastlm.errors import UserError
from fastlm.models import LayerConfig, ModelConfig, slicing
from fastlm.models import attention as attention_kinds

EVENLY = "evenly"


@dataclasses.dataclass(frozen=True)
class Part:
    """How much of a model to keep.

    Attributes:
      layers: numbers, the encoder's first; None keeps all.
      width, feed_forward_width, heads: of each layer that has as many; layers with fewer keep theirs. 0 keeps all. Of
        the last two a tuple has one for each layer that is kept.
    """

    layers: tuple[int, ...] | None = None
    width: int = 0
    feed_forward_width: int | tuple[int, ...] = 0
    heads: int | tuple[int, ...] = 0

    def config(self, cfg: ModelConfig) -> ModelConfig:
        """Returns the architecture of this part of `cfg`.

        Raises:
          UserError: there is no such part, or none that slicing could take.
        """
        cfg = self._deep(cfg)
        layers = [cfg.layer(i) for i in range(cfg.total_layers)]
        _check("width", self.width, [cfg.width])
        widths, heads = (_of_each(size, len(layers)) for size in (self.feed_forward_width, self.heads))
        for key, sizes in (("feed_forward_width", widths), ("heads", heads)):
            for size in set(sizes):
                _check(key, size, [getattr(layer, key) for layer in layers])
        cut = [heads_of(layer, size) for layer, size in zip(layers, heads)]
        units = [min(size or layer.feed_forward_width, layer.feed_forward_width) for layer, size in zip(layers, widths)]
        return slicing.resized(cfg, self.width or cfg.width, [n for n, _ in cut], [k for _, k in cut], units)

    def take(self, cfg: ModelConfig, params: Any, mesh: Mesh, scores: Scores | None = None) -> Any:
        """Returns the weights of this part of a model, whose weights lie on `mesh`.

        Args:
          scores: of the units of the layers that are kept, on the host; None for `importance.magnitude`.
        """
        small, deep = self.config(cfg), self._deep(cfg)
        if self.layers is not None:
            _, params = slicing.keep_layers(cfg, params, self.layers)
        if small == deep:
            return params
        if scores is None:
            score = functools.partial(importance.magnitude, deep)
            # Every process needs all scores, to choose the same.
            scores = jax.device_get(jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))(params))
        return slicing.keep_width(deep, params, importance.largest(deep, small, scores))[1]

    def describe(self, cfg: ModelConfig) -> str:
        """Says what of `cfg` is kept; "" for everything."""
        said = []
        if self.layers is not None:
            said.append(f"layers {', '.join(map(str, self.layers))} of {cfg.total_layers}")
        sizes = (("width", "hidden units"), ("feed_forward_width", "feed-forward units"), ("heads", "heads"))
        for key, name in sizes:
            if size := getattr(self, key):
                said.append(f"the {', '.join(map(str, size)) if isinstance(size, tuple) else size} largest {name}")
        return ", ".join(said)

    def _deep(self, cfg: ModelConfig) -> ModelConfig:
        return cfg if self.layers is None else slicing.of_layers(cfg, self.layers)


def heads_of(layer: LayerConfig, count: int) -> tuple[int, int]:
    """Returns (heads, kv heads) of a layer cut to `count` heads: by whole groups if that goes, else of each group.

    Raises:
      UserError: neither goes.
    """
    if not 0 < count < layer.heads:
        return layer.heads, layer.kv_heads
    in_group = layer.heads // layer.kv_heads
    two_ways = attention_kinds.kind(layer.attention).module.two_ways(layer)
    if count % in_group == 0 and not (two_ways and count // in_group % 2):  # as many groups of either half
        return count, count // in_group
    if count % layer.kv_heads == 0:
        return count, layer.kv_heads
    raise UserError(
        f"config.init.heads: {count} of {layer.heads} heads are neither whole groups of {in_group} that share a key, "
        f"nor as many of each of the {layer.kv_heads} groups; give a multiple of one of these"
    )


def layers_named(text: str, cfg: ModelConfig, layers: int | None, encoder_layers: int | None) -> tuple[int, ...] | None:
    """Returns the layers that `text` names, the encoder's first; None for all.

    Args:
      text: "", "evenly", or numbers, "0,2,4"; of an encoder-decoder "0,2|1,3", the encoder's and the decoder's, each
        counted from 0, where nothing means all of them.
      layers, encoder_layers: how many are wanted where they are spread evenly; None keeps that stack whole.

    Raises:
      UserError: none of these, or layers that are not there.
    """
    if not text:
        return None
    if text == EVENLY:
        if layers is None and encoder_layers is None:
            raise UserError("config.init.layers: 'evenly' leaves open how many; say so with config.model.layers")
        own = slicing.evenly(cfg.layers if layers is None else layers, cfg.layers)
        wanted = cfg.encoder_layers if encoder_layers is None else encoder_layers
        encoder = slicing.evenly(wanted, cfg.encoder_layers) if cfg.encoder_layers else ()
        return encoder + tuple(i + cfg.encoder_layers for i in own)
    sides = text.split("|")
    if len(sides) != (2 if cfg.encoder_layers else 1):
        form = "'0,2|1,3', the encoder's and the decoder's" if cfg.encoder_layers else "'0,2,4'"
        raise UserError(f"config.init.layers: '{text}' does not fit a model of family '{cfg.family}'; write {form}")
    encoder = _numbers(sides[0], cfg.encoder_layers, text) if cfg.encoder_layers else ()
    return encoder + tuple(i + cfg.encoder_layers for i in _numbers(sides[-1], cfg.layers, text))


def _numbers(side: str, of: int, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in side.split(",")] if side.strip() else [str(i) for i in range(of)]
    numbers = [int(part) if part.isdecimal() else -1 for part in parts]
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= of:
        raise UserError(
            f"config.init.layers: '{text}': give 'evenly', or ascending numbers from 0 to {of - 1}, each once"
        )
    return tuple(numbers)


def _of_each(size: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * layers


def _check(key: str, size: int, there: Sequence[int]) -> None:
    if not 0 <= size <= max(there):
        raise UserError(
            f"config.init.{key}: {size} cannot be kept of {max(there)}; give 1 to {max(there)}, or 0 for all"
        )
