"""How long a layer of so many heads and units takes, on this machine: a table of timings that add up to a model's.

Notable: everything is a share of the whole model's time, each run beside it in the same turn, so that what the machine
does besides cancels. A unit is timed inside the model as it is, cut alike in all layers of a kind, and what that saves
is divided among them: layers timed alone, or in models of another depth, are up to twice as fast, because their weights
stay in the cache. What is no layer's (embeddings, vocabulary, sampling) is in what is left.
Each model runs twice in a turn, and the second time counts: the first finds another model's weights in the cache.
Left out: models with two stacks.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from fastlm.compress.parts import heads_of
from fastlm.errors import UserError
from fastlm.measurement import ruler
from fastlm.measurement.ruler import Load
from fastlm.models import Compute, LayerConfig, ModelConfig, slicing
from fastlm.search import clock
from fastlm.search.layer_sizes import Cost, Sizes

TURNS = 9
Kind = tuple[str, str, Sizes]  # of attention and of feed-forward, and how much of them there is


@dataclasses.dataclass(frozen=True)
class Latencies:
    """Shares of the whole model's time.

    Attributes:
      load: that was timed.
      rest: of what is no layer's.
      layers: by kind of layer and `Sizes`.
    """

    load: Load
    rest: float
    layers: Mapping[tuple[Kind, Sizes], float]

    def cost(self, cfg: ModelConfig) -> Cost:
        """Returns what a layer of a model costs: what was timed, savings of heads and units added up."""

        def cost(i: int, sizes: Sizes) -> float:
            kind, whole = kind_of(cfg.layer(i)), whole_of(cfg.layer(i))
            units = self.layers[kind, whole._replace(feed_forward_width=sizes.feed_forward_width)]
            heads = self.layers[kind, whole._replace(heads=sizes.heads, kv_heads=sizes.kv_heads)]
            return max(units + heads - self.layers[kind, whole], 0.0)

        return cost


def kind_of(layer: LayerConfig) -> Kind:
    """Returns what layers with the same timings have in common."""
    return (layer.attention, layer.feed_forward, whole_of(layer))


def whole_of(layer: LayerConfig) -> Sizes:
    """Returns the sizes of a layer as it is."""
    return Sizes(layer.heads, layer.kv_heads, layer.feed_forward_width)


def table(
    cfg: ModelConfig, compute: Compute, heads: Sequence[int], widths: Sequence[int], load: Load, turns: int = TURNS
) -> Latencies:
    """Times the model with layers of so many heads, and of so many units.

    Args:
      heads, widths: what there may be in a layer, beside what is there; more than a layer has are left out.

    Raises:
      UserError: a model of two stacks.
    """
    if cfg.encoder_layers:
        raise UserError("timings of units are for models with one stack; give a budget of parameters")
    kinds: dict[Kind, list[int]] = collections.defaultdict(list)
    for i in range(cfg.layers):
        kinds[kind_of(cfg.layer(i))].append(i)
    cuts = {
        (kind, sizes): cut(cfg, own, sizes)
        for kind, own in kinds.items()
        for sizes in _sizes(cfg.layer(own[0]), heads, widths)
    }
    gone = {kind: len(own) - len(own) // 2 if cfg.layers > 1 else 0 for kind, own in kinds.items()}
    shorter = {kind: without(cfg, own[: gone[kind]]) for kind, own in kinds.items() if 0 < gone[kind] < cfg.layers}
    found = shares(cfg, [*cuts.values(), *shorter.values()], compute, load, turns)
    by_cut, by_depth = dict(zip(cuts, found)), dict(zip(shorter, found[len(cuts) :]))
    layers: dict[tuple[Kind, Sizes], float] = {}
    for kind, own in kinds.items():
        one = (1 - by_depth[kind]) / gone[kind] if kind in by_depth else 1 / cfg.layers
        layers[kind, kind[-1]] = one
        layers |= {(kind, sizes): one - (1 - share) / len(own) for (of, sizes), share in by_cut.items() if of == kind}
    whole = sum(layers[kind_of(cfg.layer(i)), whole_of(cfg.layer(i))] for i in range(cfg.layers))
    return Latencies(load, 1 - whole, layers)


def shares(
    whole: ModelConfig, others: Sequence[ModelConfig], compute: Compute, load: Load, turns: int = TURNS
) -> list[float]:
    """Returns the time of each model as a share of the whole one's, medians over turns, in each of which both ran."""
    found = []
    first = _warm(clock.runner(whole, compute))
    for other in others:
        taken = ruler.take_turns({"whole": first, "other": _warm(clock.runner(other, compute))}, [load], turns)
        pairs = zip(*(taken[name][str(load)] for name in ("other", "whole")))
        found.append(statistics.median(sum(a) / sum(b) for a, b in pairs))
    return found


def cut(cfg: ModelConfig, layers: Sequence[int], sizes: Sizes) -> ModelConfig:
    """Returns the model in which these layers have these sizes."""
    each = [sizes if i in layers else whole_of(cfg.layer(i)) for i in range(cfg.layers)]
    return slicing.resized(cfg, cfg.width, *map(list, zip(*each)))


def without(cfg: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Returns the model that does not have these layers."""
    return slicing.of_layers(cfg, [i for i in range(cfg.layers) if i not in layers])


def _warm(run: Callable[[Load], Sequence[float]]) -> Callable[[Load], Sequence[float]]:
    def twice(load: Load) -> Sequence[float]:
        run(load)
        return run(load)

    return twice


def _sizes(layer: LayerConfig, heads: Sequence[int], widths: Sequence[int]) -> list[Sizes]:
    """What a layer may have: fewer heads, or fewer units."""
    whole, found = whole_of(layer), []
    for count in heads:
        if count < layer.heads:
            own, keys = heads_of(layer, count)
            found.append(whole._replace(heads=own, kv_heads=keys))
    found += [whole._replace(feed_forward_width=width) for width in widths if width < layer.feed_forward_width]
    return list(dict.fromkeys(found))
