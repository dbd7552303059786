"""How many heads and feed-forward units each layer keeps, and which layers, for a budget: by what was read of each.

Notable: options of a layer are the levels that were read (`search.sensitivity`), alone and together, and, where that
was read, the whole layer gone. Losses are added up, which says less the more is gone; so cut in rounds, with training
between them. Costs are numbers of parameters, or seconds by a table of unit timings (`search.latencies`).
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fastlm.compress.parts import Part, heads_of
from fastlm.errors import UserError
from fastlm.models import ModelConfig, slicing, units
from fastlm.search.budgets import Option, choose
from fastlm.search.sensitivity import Reading, left_of, numbers


class Sizes(NamedTuple):
    """What a layer keeps."""

    heads: int
    kv_heads: int
    feed_forward_width: int


Cost = Callable[[int, Sizes], float]


class Found(NamedTuple):
    """A choice.

    Attributes:
      part: to keep.
      cost: of the layers that are kept.
      rise: of the loss, as added up.
    """

    part: Part
    cost: float
    rise: float


def parameters(cfg: ModelConfig) -> Cost:
    """Returns how many numbers a layer of these sizes has."""

    def cost(i: int, sizes: Sizes) -> float:
        own = {units.feed_forward(i): sizes.feed_forward_width}
        for part in units.attention_parts(cfg, i):
            own |= {units.heads(i, part): sizes.heads, units.heads(i, part, "kv_heads"): sizes.kv_heads}
        return numbers(cfg, i, own)

    return cost


def options(cfg: ModelConfig, readings: Iterable[Reading], cost: Cost) -> list[list[Option]]:
    """Returns the options of each layer: `Sizes`, or None for a layer that is gone.

    Raises:
      UserError: nothing was read of units or layers.
    """
    of_heads, of_units, of_layers = _by_layer(cfg, readings)
    if not (any(map(len, of_heads.values())) or any(map(len, of_units.values())) or of_layers):
        raise UserError(
            "no readings of heads, feed_forward or layer; read some: experiments.sensitivity --ways heads,..."
        )
    found = []
    for i in range(cfg.total_layers):
        layer = cfg.layer(i)
        whole = {(layer.heads, layer.kv_heads): 0.0}
        pairs = itertools.product(
            (whole | of_heads[i]).items(), ({layer.feed_forward_width: 0.0} | of_units[i]).items()
        )
        own = [Option(sizes := Sizes(*heads, size), cost(i, sizes), a + b) for (heads, a), (size, b) in pairs]
        found.append(own + ([Option(None, 0.0, of_layers[i])] if i in of_layers else []))
    return found


def search(cfg: ModelConfig, readings: Iterable[Reading], cost: Cost, budget: float, where: str) -> Found:
    """Returns the choice with the least loss whose layers cost no more than the budget.

    Raises:
      UserError: the budget cannot be met, or nothing was read.
    """
    chosen = choose(options(cfg, readings, cost), budget, where)
    kept = [(i, option.what) for i, option in enumerate(chosen) if option.what is not None]
    for stack in (cfg.encoder_stack, cfg.stack):
        if stack and not any(i in stack for i, _ in kept):
            raise UserError(
                f"{where}: it leaves a stack without layers; give more, or leave 'layer' out of the readings"
            )
    layers = tuple(i for i, _ in kept)
    part = Part(
        None if len(layers) == cfg.total_layers else layers,
        feed_forward_width=tuple(sizes.feed_forward_width for _, sizes in kept),
        heads=tuple(sizes.heads for _, sizes in kept),
    )
    return Found(part, math.fsum(option.cost for option in chosen), math.fsum(option.loss for option in chosen))


def least(cfg: ModelConfig, readings: Iterable[Reading], cost: Cost) -> float:
    """Returns what the cheapest choice of all layers costs."""
    return math.fsum(min(option.cost for option in group) for group in options(cfg, readings, cost))


def levels(cfg: ModelConfig, readings: Iterable[Reading]) -> tuple[list[int], list[int]]:
    """Returns how many heads, and how many units, may be left in some layer."""
    of_heads, of_units, _ = _by_layer(cfg, readings)
    heads = {count for own in of_heads.values() for count, _ in own}
    return sorted(heads), sorted({size for own in of_units.values() for size in own})


def _by_layer(cfg: ModelConfig, readings: Iterable[Reading]) -> tuple[Mapping, Mapping, Mapping]:
    """What of each layer may be left of heads (with their keys) and units, and what that or the layer's going costs."""
    of_heads: dict[int, dict[tuple[int, int], float]] = collections.defaultdict(dict)
    of_units: dict[int, dict[int, float]] = collections.defaultdict(dict)
    of_layers: dict[int, float] = {}
    for one in readings:
        i, layer = one.layer, cfg.layer(one.layer)
        if one.way == "layer":
            of_layers[i] = one.rise
        elif one.way == "feed_forward":
            of_units[i][left_of(layer.feed_forward_width, one.level)] = one.rise
        elif one.way == "heads" and one.part.endswith("/attention"):
            count = left_of(layer.heads, one.level)
            if _can_cut(cfg, i, count):
                of_heads[i][heads_of(layer, count)] = one.rise
        elif one.way == "heads":  # a layer has as many heads of both kinds
            of_heads.pop(i, None)
    return of_heads, of_units, of_layers


def _can_cut(cfg: ModelConfig, i: int, count: int) -> bool:
    """Says whether a layer alone can have so many heads."""
    if cfg.positions == "relative":  # of which a stack has one table
        return False
    try:
        heads, kv_heads = heads_of(cfg.layer(i), count)
        layers = [cfg.layer(n) for n in range(cfg.total_layers)]
        put = lambda key, value: [value if n == i else getattr(layer, key) for n, layer in enumerate(layers)]
        widths = [layer.feed_forward_width for layer in layers]
        slicing.resized(cfg, cfg.width, put("heads", heads), put("kv_heads", kv_heads), widths)
    except UserError:
        return False
    return True
