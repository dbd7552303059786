"""Optimizers: one table of directions, one order of steps, rules by parameter path.

The order is the usual one: clip by global norm, direction (Adam, Muon, ...), decoupled weight decay,
rate of the leaf, schedule. Notable: what differs between leaves (decay, rate, sign, shape factor) is
worked out once, in Python, into one `Rule` for each path; the transform multiplies by plain numbers,
so that a leaf is one fused pass and no mask is an array. Frozen leaves have no optimizer state and
do not count in the norm. All but Muon's direction (`training.muon`) is optax.
Left out: moments in low precision, schedules that differ between groups.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax

from fastlm.errors import UserError, nearest
from fastlm.ops import paths
from fastlm.training.muon import SHAPE_FACTORS, scale_by_muon

# The table is looked up, not multiplied with: decay would only shrink the rows of rare tokens.
DECAY_EXCLUDE = ("embedding",)
# Where Muon applies, to leaves of two axes; the rest (embedding, head, norms, biases) is AdamW's.
MUON_PATHS = ("layers",)

Groups = tuple[tuple[str, Mapping[str, Any]], ...]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What the directions read; see `make`."""

    b1: float
    b2: float
    epsilon: float
    muon_momentum: float
    muon_nesterov: bool
    muon_rounds: int
    muon_dtype: str


# From gradients to a direction of descent, before decay and rate.
DIRECTIONS: dict[str, Callable[[Hyperparameters], optax.GradientTransformation]] = {
    "adamw": lambda h: optax.scale_by_adam(b1=h.b1, b2=h.b2, eps=h.epsilon),
    "muon": lambda h: scale_by_muon(
        momentum=h.muon_momentum, nesterov=h.muon_nesterov, rounds=h.muon_rounds, dtype=h.muon_dtype
    ),
    "lion": lambda h: optax.scale_by_lion(b1=h.b1, b2=h.b2),
    "sgd": lambda h: optax.trace(decay=h.b1),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one leaf moves: p <- p - schedule * rate * (factor * direction + decay * p).

    Attributes:
      direction: a key of `DIRECTIONS`, or "frozen".
      factor: on the direction; Muon's shape factor, negative for ascent.
    """

    direction: str
    rate: float = 1.0
    decay: float = 0.0
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Group:
    """What a group may set; None keeps what the leaf would have had.

    Attributes:
      rate: multiplies the schedule.
      decay: replaces the weight decay, also where there was none.
      frozen: no update and no optimizer state.
      ascent: maximises instead of minimising (multipliers of constraints).
    """

    rate: float = 1.0
    decay: float | None = None
    frozen: bool = False
    ascent: bool = False


def make(
    *,
    name: str,
    learning_rate: optax.Schedule | float,
    params: Any,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    decay_exclude: tuple[str, ...] = DECAY_EXCLUDE,
    clip: float = 1.0,
    groups: Groups = (),
    muon_paths: tuple[str, ...] = MUON_PATHS,
    muon_momentum: float = 0.95,
    muon_nesterov: bool = True,
    muon_rounds: int = 5,
    muon_dtype: str = "float32",
    muon_shape_factor: str = "rms",
    muon_adamw_rate: float = 1.0,
) -> optax.GradientTransformation:
    """Returns the optimizer for trees shaped like `params`.

    Args:
      name: a key of `DIRECTIONS`.
      params: arrays or ShapeDtypeStructs; only paths and shapes are read.
      b1, b2, epsilon: of Adam; b1 is the momentum of "sgd", both are Lion's.
      weight_decay: decoupled, times the rate; on leaves of two axes and more.
      decay_exclude: path patterns (`ops.paths`) of leaves without decay.
      clip: largest global norm of the gradients, 0 for none.
      groups: ordered (path pattern, settings of `Group`); the first that matches a leaf counts.
      muon_paths: path patterns of the matrices that "muon" handles; AdamW has the rest.
      muon_dtype: of the operands of its products, "float32" or "bfloat16"; see `training.muon`.
      muon_shape_factor: a key of `muon.SHAPE_FACTORS`.
      muon_adamw_rate: multiplies the schedule for AdamW's part under "muon".

    Raises:
      UserError: an unknown name, a number out of range, a pattern that matches nothing, nothing left to train.
    """
    _check_name("optimizer.name", name, DIRECTIONS)
    _check_name("optimizer.muon_shape_factor", muon_shape_factor, SHAPE_FACTORS)
    _check_name("optimizer.muon_dtype", muon_dtype, ("float32", "bfloat16"))
    numbers = {"epsilon": epsilon, "weight_decay": weight_decay, "clip": clip, "muon_adamw_rate": muon_adamw_rate}
    for key, value in numbers.items():
        _check_range(f"optimizer.{key}", value, math.inf)
    for key, value in {"b1": b1, "b2": b2, "muon_momentum": muon_momentum}.items():
        _check_range(f"optimizer.{key}", value, 1.0)

    leaves = paths.flatten(params)
    _check_patterns("optimizer.decay_exclude", decay_exclude, DECAY_EXCLUDE, leaves)
    if name == "muon":
        _check_patterns("optimizer.muon_paths", muon_paths, (), leaves)
    checked_groups = _groups(groups, leaves)

    def rule(path: str, leaf: Any) -> Rule:
        matrix = len(leaf.shape) >= 2
        decay = weight_decay if matrix and not _any_match(decay_exclude, path) else 0.0
        base = Rule(name, decay=decay)
        if name == "muon" and len(leaf.shape) == 2 and _any_match(muon_paths, path):
            base = dataclasses.replace(base, factor=SHAPE_FACTORS[muon_shape_factor](*leaf.shape))
        elif name == "muon":
            base = dataclasses.replace(base, direction="adamw", rate=muon_adamw_rate)
        return _grouped(base, checked_groups, path)

    rules = {path: rule(path, leaf) for path, leaf in leaves.items()}
    hyperparameters = Hyperparameters(b1, b2, epsilon, muon_momentum, muon_nesterov, muon_rounds, muon_dtype)
    return _compose(rules, hyperparameters, clip, learning_rate)


def _compose(
    rules: dict[str, Rule], hyperparameters: Hyperparameters, clip: float, learning_rate: optax.Schedule | float
) -> optax.GradientTransformation:
    directions = sorted({rule.direction for rule in rules.values()} - {"frozen"})
    if not directions:
        raise UserError("optimizer.groups: every parameter is frozen, so nothing would be trained; free some")
    transforms = {direction: DIRECTIONS[direction](hyperparameters) for direction in directions}
    only = transforms[directions[0]] if len(directions) == 1 else None
    trained = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        only or optax.partition(transforms, _labels(lambda path: rules[path].direction)),
        _decay_and_rate(rules),
        optax.scale_by_learning_rate(learning_rate),
    )
    if all(rule.direction != "frozen" for rule in rules.values()):
        return trained
    frozen = _labels(lambda path: "frozen" if rules[path].direction == "frozen" else "trained")
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, frozen)


def _labels(label: Callable[[str], str]) -> Callable[[Any], Any]:
    return lambda tree: paths.map_with_path(lambda path, _: label(path), tree)


def _decay_and_rate(rules: dict[str, Rule]) -> optax.GradientTransformation:
    def leaf(path: str, direction: jax.Array, param: jax.Array) -> jax.Array:
        rule = rules[path]
        # A neutral factor is left out and not multiplied with: the program stays the plain one.
        step = direction if rule.factor == 1 else rule.factor * direction
        step = step + rule.decay * param.astype(step.dtype) if rule.decay else step
        return step if rule.rate == 1 else rule.rate * step

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return paths.map_with_path(leaf, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _any_match(patterns: tuple[str, ...], path: str) -> bool:
    return any(paths.matches(pattern, path) for pattern in patterns)


def _grouped(base: Rule, groups: tuple[tuple[str, Group], ...], path: str) -> Rule:
    """Returns `base` as the first group that matches `path` changes it."""
    group = next((group for pattern, group in groups if paths.matches(pattern, path)), Group())
    if group.frozen:
        return Rule("frozen")
    return dataclasses.replace(
        base,
        rate=base.rate * group.rate,
        decay=base.decay if group.decay is None else group.decay,
        factor=-base.factor if group.ascent else base.factor,
    )


def _groups(groups: Groups, leaves: Mapping[str, Any]) -> tuple[tuple[str, Group], ...]:
    valid = [field.name for field in dataclasses.fields(Group)]
    checked = []
    for number, (pattern, given) in enumerate(groups):
        where = f"optimizer.groups[{number}]"
        settings = dict(given)
        paths.require_match(pattern, leaves, where)
        for key in settings:
            if key not in valid:
                raise UserError(f"{where}: no setting '{key}', one of {', '.join(valid)}{nearest(key, valid)}")
        for key in {"rate", "decay"} & settings.keys():
            _check_range(f"{where}.{key}", settings[key], math.inf)
        checked.append((pattern, Group(**settings)))
    return tuple(checked)


def _check_patterns(where: str, given: tuple[str, ...], defaults: tuple[str, ...], leaves: Mapping[str, Any]) -> None:
    for pattern in given:
        if pattern not in defaults:
            paths.require_match(pattern, leaves, where)


def _check_name(where: str, name: str, table: Collection[str]) -> None:
    if name not in table:
        raise UserError(f"{where}: no '{name}', one of {', '.join(table)}{nearest(name, table)}")


def _check_range(where: str, value: Any, end: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value < end):
        raise UserError(f"{where}: {value!r} is not a number of at least 0 and below {end:g}")
