"""Learning-rate schedules: warm-up, then one of five shapes, composed from optax schedules.

Notable: every length is a number of steps (int) or a fraction of the run (float up to 1), so a
config survives a change of `steps`. Warm-up begins at peak / (warmup + 1) and not at zero, so the
first batch is not wasted. "wsd" is warm-up, stable, decay (MiniCPM, arXiv 2404.06395); its "sqrt"
cooldown is 1 - sqrt(x) (Hägele et al., arXiv 2405.18392). "rsqrt" is the inverse square root, which
with `timescale` equal to `warmup` is the schedule of T5 (arXiv 1910.10683). Left out: restarts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastlm.errors import UserError, nearest


class Shape(NamedTuple):
    """What follows the warm-up; lengths in steps, rates absolute."""

    peak: float
    final: float
    steps: int
    decay: int
    cooldown: Callable[[jax.Array], jax.Array]
    timescale: int


def _rsqrt(shape: Shape) -> optax.Schedule:
    return lambda step: jnp.maximum(shape.peak * jax.lax.rsqrt(1 + step / shape.timescale), shape.final)


def _stable_then_decay(shape: Shape) -> optax.Schedule:
    def decay(step):
        left = shape.cooldown(jnp.clip(step / max(shape.decay, 1), 0, 1))
        return shape.final + (shape.peak - shape.final) * left

    return optax.join_schedules([optax.constant_schedule(shape.peak), decay], [shape.steps - shape.decay])


# What is left of the way from peak to final, at x in [0, 1] of the cooldown.
COOLDOWNS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - jnp.sqrt(x),
    "cosine": lambda x: (1 + jnp.cos(math.pi * x)) / 2,
}

SHAPES: dict[str, Callable[[Shape], optax.Schedule]] = {
    "constant": lambda shape: optax.constant_schedule(shape.peak),
    "linear": lambda shape: optax.linear_schedule(shape.peak, shape.final, max(shape.steps, 1)),
    "cosine": lambda shape: optax.cosine_decay_schedule(shape.peak, max(shape.steps, 1), shape.final / shape.peak),
    "rsqrt": _rsqrt,
    "wsd": _stable_then_decay,
}


def make(
    *,
    name: str,
    peak: float,
    steps: int,
    warmup: int | float = 0,
    final: float = 0.0,
    decay_fraction: int | float = 0.1,
    decay_shape: str = "linear",
    timescale: int | float = 0.1,
) -> optax.Schedule:
    """Returns step -> learning rate; safe to call inside `jit`, constant after `steps`.

    Args:
      name: a key of `SHAPES`.
      peak: the rate that the warm-up reaches.
      steps: length of the whole run.
      warmup: steps, or fraction of the run, of the linear rise.
      final: rate at the end as a fraction of `peak`; a floor for "rsqrt", unused by "constant".
      decay_fraction: "wsd" only, length of the cooldown at the end, in steps or as a fraction.
      decay_shape: "wsd" only, a key of `COOLDOWNS`.
      timescale: "rsqrt" only, steps after warm-up until the rate has fallen to peak / sqrt(2).

    Raises:
      UserError: an unknown name, or a value out of its range.
    """
    for key, value, table in (("name", name, SHAPES), ("decay_shape", decay_shape, COOLDOWNS)):
        if value not in table:
            raise UserError(f"schedule.{key}: no '{value}', one of {', '.join(table)}{nearest(value, table)}")
    if not (math.isfinite(peak) and peak > 0 and steps > 0 and 0 <= final <= 1):
        raise UserError(f"schedule: needs peak > 0, steps > 0, 0 <= final <= 1; got {peak=}, {steps=}, {final=}")
    warm = in_steps(warmup, steps, "schedule.warmup")
    decay = in_steps(decay_fraction, steps, "schedule.decay_fraction") if name == "wsd" else 0
    if warm + decay > steps:
        raise UserError(f"schedule: warm-up ({warm}) and cooldown ({decay}) are longer than the run ({steps} steps)")
    scale = max(in_steps(timescale, steps, "schedule.timescale"), 1) if name == "rsqrt" else 1
    after = SHAPES[name](Shape(peak, final * peak, steps - warm, decay, COOLDOWNS[decay_shape], scale))
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warm + 1), peak, warm), after], [warm])


def in_steps(length: int | float, steps: int, where: str) -> int:
    """Returns `length` in steps: an int is one already, a float in [0, 1] is a fraction of `steps`.

    A whole float above 1 is a number of steps too: configs hold 300 as 300.0 where the base has a fraction.

    Raises:
      UserError: negative, or neither whole nor a fraction.
    """
    whole = isinstance(length, int) or (length > 1 and float(length).is_integer())
    if not length >= 0 or not (whole or length <= 1):
        raise UserError(f"{where}: {length} is neither a whole number of steps nor a fraction of them up to 1.0")
    return int(length) if whole else round(length * steps)
