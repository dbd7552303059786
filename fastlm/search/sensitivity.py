"""How much the loss rises as one part of a trained model is made smaller alone: by layer, part, way and level.

Notable: every way is a rewrite of (cfg, params), and all but whole layers leave shapes as they are, so that hundreds of
readings are one compiled program. Units are taken out by zeros where they are read, which is the cut exactly (see
`models.slicing`). All readings are of the same batches: a difference has an error of its own, over batches.
What decides inside a part is its Fisher information (`importance`, `low_rank`).
Left out: parts hurt together, of which the sum of these readings says less the more they are.
"""

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.compress import importance, low_rank, masks
from fastlm.compress.evidence import INPUTS, OUTPUTS, PRODUCTS, Evidence
from fastlm.errors import UserError
from fastlm.models import ModelConfig, abstract, slicing, units
from fastlm.models.units import Unit
from fastlm.ops import paths
from fastlm.ops.contract import dense
from fastlm.tasks.task import Batch, Task

NEEDS = (INPUTS, PRODUCTS, OUTPUTS)
FILE = "readings.json"
SCORE = "fisher"
MULTIPLE = 8  # of feed-forward units that stay, where there are many: for meshes and for vector units
Params = Any
Known = Mapping[str, Evidence]


@dataclasses.dataclass(frozen=True)
class Reading:
    """One part made smaller in one way.

    Attributes:
      part: its path, "layers/3/attention/q", "layers/3/attention" of heads, "layers/3".
      way, level: one of `WAYS`, and the share of the part that is gone.
      gone: numbers that a model without it would have less.
      rise, error: of the mean loss, nats, and its standard error over batches.
    """

    part: str
    way: str
    level: float
    gone: int
    rise: float
    error: float

    @property
    def layer(self) -> int:
        """The number of its layer."""
        return int(self.part.split("/")[1])


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make a part smaller.

    Attributes:
      parts: `(cfg) -> paths`.
      make: `(cfg, params, known, part, level) -> (cfg, params, numbers gone)`.
      whole: whether it has one level only, everything.
      count: `(cfg, part) -> units`, of which levels are rounded to whole ones; None where a level is as it is.
    """

    parts: Callable[[ModelConfig], Sequence[str]]
    make: Callable[[ModelConfig, Params, Known, str, float], tuple[ModelConfig, Params, int]]
    whole: bool = False
    count: Callable[[ModelConfig, str], int] | None = None


def load(path: Path, cfg: ModelConfig) -> tuple[dict[str, Any], list[Reading]]:
    """Returns (what all readings of a file have in common, the readings), as `save` wrote them.

    Raises:
      UserError: it is not there, damaged, or of another architecture.
    """
    try:
        found = json.loads(path.read_text())
        settings, rows = found["settings"], [Reading(**row) for row in found["readings"]]
    except OSError:
        raise UserError(f"{path}: cannot be read; write it with experiments.sensitivity") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, and read again") from None
    if settings.get("model") != json.loads(cfg.to_json()):
        raise UserError(f"{path}: holds readings of another architecture; read this model with experiments.sensitivity")
    return settings, rows


def as_text(cfg: ModelConfig, settings: Mapping[str, Any], readings: Sequence[Reading]) -> str:
    """Returns the file that `load` reads."""
    rows = [dataclasses.asdict(one) for one in readings]
    return json.dumps({"settings": {**settings, "model": json.loads(cfg.to_json())}, "readings": rows}, indent=1)


def matrices(cfg: ModelConfig) -> list[str]:
    """Returns the paths of all matrices of layers."""
    return [path for path, names in abstract(cfg)[1].items() if len(names) == 2 and path.startswith("layers/")]


def _layers(cfg: ModelConfig) -> list[str]:
    alone = lambda i: len(cfg.stack if i in cfg.stack else cfg.encoder_stack) == 1
    return [f"layers/{i}" for i in range(cfg.total_layers) if not alone(i)]


def _with_one(params: Params, path: str, leaf: Array) -> Params:
    return paths.map_with_path(lambda own, old: leaf if own == path else old, params)


def _zeros(cfg: ModelConfig, params: Params, known: Known, part: str, level: float) -> tuple[ModelConfig, Params, int]:
    w = paths.flatten(params)[part]
    score = importance.scores(SCORE, {part: w}, {part: known[part]}, jax.random.key(0))[part]
    mask = masks.by_matrix({part: score}, level)[part]
    return cfg, _with_one(params, part, jnp.where(mask, w, 0)), round(level * w.size)


def _thin(cfg: ModelConfig, params: Params, known: Known, part: str, level: float) -> tuple[ModelConfig, Params, int]:
    w = paths.flatten(params)[part]
    rank = max(1, int((1 - level) * w.size / sum(w.shape)))
    full, _ = low_rank.factors(w, known[part], "fisher")
    return cfg, _with_one(params, part, dense(low_rank.cut(full, rank))), w.size - rank * sum(w.shape)


def left_of(count: int, level: float) -> int:
    """Returns how many of so many units stay at a level: at least one goes, and one stays; of many, a multiple of 8."""
    step = MULTIPLE if count >= 8 * MULTIPLE else 1
    most = (count - 1) // step * step
    return min(most, max(step, round((1 - level) * count / step) * step))


def numbers(cfg: ModelConfig, layer: int, sizes: Mapping[Unit, int] = types.MappingProxyType({})) -> int:
    """Returns how many numbers a layer has, if it had so many of some units."""
    counts, shapes, total = units.counts(cfg), paths.flatten(abstract(cfg)[0]), 0
    for path, names in units.axes(cfg).items():
        if path.startswith(f"layers/{layer}/"):
            sides = zip(shapes[path].shape, names)
            total += math.prod(
                n if unit is None else n // counts[unit] * sizes.get(unit, counts[unit]) for n, unit in sides
            )
    return total


def numbers_of_layers(cfg: ModelConfig) -> int:
    """Returns how many numbers all layers have."""
    return sum(numbers(cfg, i) for i in range(cfg.total_layers))


def _with_keys(cfg: ModelConfig, own: Unit) -> tuple[Unit, ...]:
    """A unit, and where each head has a key of its own, that."""
    if own.kind != "heads" or cfg.layer(own.layer).kv_heads != cfg.layer(own.layer).heads:
        return (own,)
    return (own, units.heads(own.layer, own.part, "kv_heads"))


def _units(kind: str) -> Way:
    def unit(cfg: ModelConfig, part: str) -> Unit:
        _, layer, name = part.split("/")
        return units.feed_forward(int(layer)) if kind == "feed_forward" else units.heads(int(layer), name)

    def parts(cfg: ModelConfig) -> list[str]:
        names = ["feed_forward"] if kind == "feed_forward" else ["attention", "cross_attention"]
        every = (f"layers/{i}/{name}" for i in range(cfg.total_layers) for name in names)
        counts = units.counts(cfg)
        return [part for part in every if counts.get(unit(cfg, part), 1) > 1]

    def make(
        cfg: ModelConfig, params: Params, known: Known, part: str, level: float
    ) -> tuple[ModelConfig, Params, int]:
        leaves, own, count = paths.flatten(params), unit(cfg, part), units.counts(cfg)[unit(cfg, part)]
        here = {path: seen for path, seen in known.items() if own in units.axes(cfg)[path]}
        scores = importance.of_units(cfg, importance.scores(SCORE, leaves, here, jax.random.key(0)))[own]
        keep = left_of(count, level)
        stays = masks.largest(scores, keep)

        def cut(path: str, leaf: Array) -> Array:
            names = units.axes(cfg)[path]
            if len(names) < 2 or names[0] != own:
                return leaf
            return jnp.where(jnp.repeat(stays, leaf.shape[0] // count)[:, None], leaf, 0)

        gone = numbers(cfg, own.layer) - numbers(cfg, own.layer, dict.fromkeys(_with_keys(cfg, own), keep))
        return cfg, paths.map_with_path(cut, params), gone

    return Way(parts, make, count=lambda cfg, part: units.counts(cfg)[unit(cfg, part)])


def _layer(cfg: ModelConfig, params: Params, known: Known, part: str, level: float) -> tuple[ModelConfig, Params, int]:
    own = int(part.split("/")[1])
    small, rest = slicing.keep_layers(cfg, params, [i for i in range(cfg.total_layers) if i != own])
    return small, rest, sum(leaf.size for leaf in jax.tree.leaves(params["layers"][str(own)]))


WAYS: dict[str, Way] = {
    "zeros": Way(matrices, _zeros),
    "low_rank": Way(matrices, _thin),
    "heads": _units("heads"),
    "feed_forward": _units("feed_forward"),
    "layer": Way(_layers, _layer, whole=True),
}


def asked(cfg: ModelConfig, ways: Iterable[str], levels: Sequence[float]) -> list[tuple[str, str, float]]:
    """Returns (part, way, level) of everything there is to read; of levels that leave as many units, the first."""
    found: dict[tuple[str, str, float], tuple[str, str, float]] = {}
    for name in ways:
        way = WAYS[name]
        for level in (1.0,) if way.whole else levels:
            for part in way.parts(cfg):
                left = level if way.count is None else left_of(way.count(cfg, part), level)
                found.setdefault((part, name, left), (part, name, level))
    return list(found.values())


def readings(
    cfg: ModelConfig,
    make_task: Callable[[ModelConfig], Task],
    params: Params,
    known: Known,
    batches: Sequence[Batch],
    wanted: Iterable[tuple[str, str, float]],
) -> Iterator[Reading]:
    """Yields a reading for each that is wanted.

    Nothing here is jitted but the loss: rewrites are a few operations, each compiled once for a shape.

    Args:
      make_task: the model's task, with another architecture.
      known: `NEEDS` of all matrices of layers.
      batches: on the devices; all are read for each.
    """
    sums: dict[ModelConfig, Callable[[Params, Batch], tuple[Array, Array]]] = {}

    def each(cfg: ModelConfig, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Returns the summed loss of each batch, and its count."""
        if cfg not in sums:
            sums[cfg] = jax.jit(_sums_of(make_task(cfg)))
        found = [sums[cfg](params, batch) for batch in batches]
        totals, counts = zip(*jax.device_get(found))
        return np.asarray(totals, np.float64), np.asarray(counts, np.float64)

    before, counts = each(cfg, params)
    for part, way, level in wanted:
        small, rest, gone = WAYS[way].make(cfg, params, known, part, level)
        rises = (each(small, rest)[0] - before) / counts
        rise = float(np.sum(rises * counts) / np.sum(counts))
        error = float(np.std(rises, ddof=1) / math.sqrt(len(rises))) if len(rises) > 1 else math.nan
        yield Reading(part, way, level, gone, rise, error)


def _sums_of(task: Task) -> Callable[[Params, Batch], tuple[Array, Array]]:
    def sums(params: Params, batch: Batch) -> tuple[Array, Array]:
        step, weights = jnp.zeros((), jnp.int32), {"model": params}
        batch = task.prepare(weights, task.constants, batch, step, None)
        rows = len(next(iter(batch.values())))
        total, count, _ = task.loss(weights, task.constants, task.carry(rows), batch, step, None)
        return total, count

    return sums
