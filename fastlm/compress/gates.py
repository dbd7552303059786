"""Units that a model learns to do without: a gate on each head and feed-forward unit, closed until a share is gone.

Notable: a gate is a number from 0 to 1 drawn from a stretched and clipped distribution, so that it is exactly 0 or 1
most of the time and its chance to be open has a gradient (hard concrete, arXiv 1712.01312). How many numbers are gone
is held to a target by multipliers, which climb in `update` while the model and its gates descend (CoFi, 2204.00408,
and Sheared LLaMA, 2310.06694; there the optimizer has them). Evaluation and export see the likeliest gates, multiplied
into what reads the units: a closed one leaves rows of zeros, which `experiments.prune --dead` cuts out exactly.
Left out: gates on layers and on hidden units.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastlm import configuration
from fastlm.compress import schedules
from fastlm.compress.parts import Part, heads_of
from fastlm.compress.setting import Setting
from fastlm.errors import UserError
from fastlm.models import LayerConfig, ModelConfig, abstract, units
from fastlm.models.units import Unit
from fastlm.ops import paths
from fastlm.ops.contract import dense
from fastlm.ops.leaf import is_whole
from fastlm.tasks.task import Compression, Task

NAME = "gated"
KINDS = ("heads", "feed_forward")
STEEPNESS, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the distribution, and what it is stretched to
OPEN = 2.5  # where gates begin: 98 in 100 are open, and the likeliest is 1


@dataclasses.dataclass(frozen=True)
class Gated:
    """The wrapper "gated".

    Attributes:
      target: share of the numbers of all units with gates that is gone, a number or a schedule.
      units: which have gates, of `KINDS`.
      rate: at which multipliers climb.
    """

    target: float | str = "linear(start=0.0, end=0.5, until=0.4)"
    units: tuple[str, ...] = KINDS
    rate: float = 1.0

    def __post_init__(self) -> None:
        for kind in self.units:
            configuration.checked(kind, str, f"config.{NAME}.units")
            if kind not in KINDS:
                raise UserError(f"config.{NAME}.units: no '{kind}'; of: {', '.join(KINDS)}")
        if not self.units:
            raise UserError(f"config.{NAME}.units: empty; give some of {', '.join(KINDS)}")
        if not 0 < self.rate < math.inf:
            raise UserError(f"config.{NAME}.rate: must be a positive number, got {self.rate}")
        self._target(1)

    def _target(self, steps: int) -> schedules.Schedule:
        return schedules.make(self.target, steps, f"config.{NAME}.target", most=0.99)

    def __call__(self, task: Task, setting: Setting) -> Task:
        """Returns the task with gates beside the model."""
        cfg = setting.model.cfg
        readers = {path: unit for path, unit in readers_of(cfg).items() if unit.kind in self.units}
        sizes = {key_of(unit): sizes_of(cfg)[unit] for unit in readers.values()}
        counts = {key_of(unit): units.counts(cfg)[unit] for unit in readers.values()}
        parts = _Wrapper(task, {path: key_of(unit) for path, unit in readers.items()}, sizes, counts)
        return dataclasses.replace(
            task,
            init=parts.init,
            compression=parts.compression(self._target(setting.steps), self.rate),
            export=parts.export,
            axes=task.axes | {f"{NAME}/{key}": (None,) for key in counts},
        )


def readers_of(cfg: ModelConfig) -> dict[str, Unit]:
    """Returns the matrices that read from heads or feed-forward units, by path within the model, and which."""
    return {
        path: names[0]
        for path, names in units.axes(cfg).items()
        if len(names) == 2 and names[0] is not None and names[0].kind in KINDS
    }


def key_of(unit: Unit) -> str:
    """Returns the path of a unit's gates."""
    return f"layers/{unit.layer}/{unit.part or unit.kind}"


def sizes_of(cfg: ModelConfig) -> dict[Unit, int]:
    """Returns how many numbers go with one unit; with a head go its key and value where they are its own."""
    sizes, counts = dict.fromkeys(units.counts(cfg), 0), units.counts(cfg)
    for path, leaf in paths.flatten(abstract(cfg)[0]).items():
        for unit in {unit for unit in units.axes(cfg)[path] if unit is not None}:
            sizes[unit] += leaf.size // counts[unit]
    for unit, count in counts.items():
        keys = units.heads(unit.layer, unit.part, "kv_heads")
        if unit.kind == "heads" and counts[keys] == count:
            sizes[unit] += sizes[keys]
    return sizes


def drawn(logits: Float[Array, "U"], key: Array | None) -> Float[Array, "U"]:
    """Returns gates, or the likeliest without a key."""
    if key is None:
        noise = jnp.zeros_like(logits)
    else:
        noise = jax.random.logistic(key, logits.shape, logits.dtype)
    return jnp.clip(jax.nn.sigmoid((logits + noise) / STEEPNESS) * (HIGH - LOW) + LOW, 0, 1)


def chance(logits: Float[Array, "U"]) -> Float[Array, "U"]:
    """Returns how likely each is not closed."""
    return jax.nn.sigmoid(logits - STEEPNESS * math.log(-LOW / HIGH))


def alive(cfg: ModelConfig, params: Any) -> tuple[Part, dict[Unit, np.ndarray]]:
    """Returns the part of a model that something reads from, and scores by which its units are chosen.

    At least one unit of each layer stays; heads that share keys go by whole groups, or as many of each, and where
    neither keeps all that are read, more of them stay.

    Raises:
      UserError: everything is read.
    """
    leaves = paths.flatten(params, is_leaf=is_whole)
    scores = {unit: np.zeros(count) for unit, count in units.counts(cfg).items()}
    for path, unit in readers_of(cfg).items():
        rows = np.asarray(dense(leaves[path]), np.float64)
        scores[unit] = scores[unit] + np.square(rows).reshape(len(scores[unit]), -1).sum(axis=1)
    left = {unit: max(1, int(np.count_nonzero(score))) for unit, score in scores.items()}
    heads = []
    for i in range(cfg.total_layers):
        own = [scores[units.heads(i, part)] > 0 for part in units.attention_parts(cfg, i)]
        counts = range(1, cfg.layer(i).heads + 1)
        heads.append(next(n for n in counts if all(_keeps(cfg.layer(i), n, read) for read in own)))
    widths = tuple(left[units.feed_forward(i)] for i in range(cfg.total_layers))
    part = Part(feed_forward_width=widths, heads=tuple(heads))
    if part.config(cfg) == cfg:
        raise UserError("--dead: something reads from every unit of this model; nothing can be cut out exactly")
    return part, scores


def _keeps(layer: LayerConfig, heads: int, read: np.ndarray) -> bool:
    """Says whether a layer cut to so many heads has all that are read."""
    try:
        _, keys = heads_of(layer, heads)
    except UserError:
        return False
    by_group = read.reshape(layer.kv_heads, -1).sum(axis=1)
    if keys < layer.kv_heads:
        return np.count_nonzero(by_group) <= keys
    return by_group.max() <= heads // keys


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """Around a task: `readers` and the gates they go through, numbers of one unit, and how many there are."""

    task: Task
    readers: Mapping[str, str]
    sizes: Mapping[str, int]
    counts: Mapping[str, int]

    def init(self, rng: Array, model_params: Any) -> Any:
        gates = {key: jnp.full((count,), OPEN) for key, count in self.counts.items()}
        return {**self.task.init(rng, model_params), NAME: paths.nested(gates)}

    def compression(self, target: schedules.Schedule, rate: float) -> Compression:
        inner = self.task.compression
        zero = lambda: jnp.zeros(())

        def view(params: Any, constants: Any, state: Any, step: Array, rng: Array | None) -> Any:
            weights = inner.view(params, constants, state["inner"], step, rng)
            key = None if rng is None else jax.random.fold_in(rng, 1)
            return {**weights, "model": self.through(weights["model"], params[NAME], key)}

        def penalty(params: Any, state: Any, step: Array) -> tuple[Array, dict[str, Array]]:
            value, metrics = inner.penalty(params, state["inner"], step)
            gone, wanted = self.gone(params), target(step)
            gap = wanted - gone
            held = state["linear"] * gap + state["square"] * gap**2
            return value + held, metrics | {"gone": gone, "gone_wanted": wanted}

        def update(params: Any, state: Any, grads: Any, aux: Any, step: Array, rng: Array) -> tuple[Any, Any]:
            params, own = inner.update(params, state["inner"], grads, aux, step, rng)
            gap = target(step) - self.gone(params)
            linear, square = state["linear"] + rate * gap, state["square"] + rate * gap**2
            return params, {"inner": own, "linear": linear, "square": square}

        init = lambda params: {"inner": inner.init(params), "linear": zero(), "square": zero()}
        return Compression(init, view, penalty, update)

    def gone(self, params: Any) -> Array:
        """Returns the share of the numbers of all units that is expected to be gone."""
        logits = paths.flatten(params[NAME])
        left = sum(self.sizes[key] * jnp.sum(chance(own)) for key, own in logits.items())
        return 1 - left / sum(self.sizes[key] * count for key, count in self.counts.items())

    def through(self, model: Any, gates: Any, key: Array | None) -> Any:
        """Returns the model with gates on what reads the units."""
        logits = paths.flatten(gates)
        keys = dict.fromkeys(logits) if key is None else dict(zip(logits, jax.random.split(key, len(logits))))
        found = {name: drawn(own, keys[name]) for name, own in logits.items()}

        def one(path: str, leaf: Any) -> Any:
            if path not in self.readers:
                return leaf
            if is_whole(leaf):
                raise UserError(f"config.wrappers: '{NAME}' comes before what gives weights another form (lora)")
            own = found[self.readers[path]]
            return leaf * jnp.repeat(own, leaf.shape[0] // own.shape[0])[:, None]

        return paths.map_with_path(one, model, is_leaf=is_whole)

    def export(self, params: Any, constants: Any, state: Any) -> Any:
        inner = self.task.export
        model = params["model"] if inner is None else inner(params, constants, state["inner"])
        return self.through(model, params[NAME], None)
