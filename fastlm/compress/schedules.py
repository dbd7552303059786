"""Values that change while a run goes on: weights of terms, temperatures, shares.

A config gives a number, or "linear(start=0.9, end=0.5)" or "cosine(...)", with `until=0.5` to be done at half the run;
"switch(start=1, end=0, until=0.5)" keeps its start until then, and has its end from there on.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm import configuration
from fastlm.errors import UserError, nearest

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

SHAPES: dict[str, Callable[[Array], Array]] = {  # how much of the way is gone at x in [0, 1]
    "linear": lambda x: x,
    "cosine": lambda x: (1 - jnp.cos(math.pi * x)) / 2,
    "switch": jnp.floor,
}


@dataclasses.dataclass(frozen=True)
class Ends:
    """From `start` at the first step to `end` at the share `until` of all steps."""

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1 or not math.isfinite(self.start) or not math.isfinite(self.end):
            raise UserError(f"start and end must be numbers and until above 0 and at most 1, got {self}")


def make(value: float | str, steps: int, where: str, *, least: float = 0.0, above: bool = False) -> Schedule:
    """Returns step -> value.

    Args:
      steps: of the whole run.
      where: the config's key, for messages.
      least: what no value may be below (nor equal, if `above`).

    Raises:
      UserError: neither a number nor a schedule, or out of range.
    """
    if isinstance(value, str):
        name, options = configuration.call(value, where)
        if name not in SHAPES:
            hint = nearest(name, SHAPES) or f"; one of: {', '.join(SHAPES)}"
            raise UserError(f"{where}: unknown schedule '{name}'{hint}")
        with configuration.naming(where.removeprefix("config.")):
            ends = configuration.make(Ends, f"{where.removeprefix('config.')}: {name}", options)
    else:
        name, ends = "linear", Ends(float(value), float(value)) if math.isfinite(value) else None
    if ends is None or any(end < least or (above and end == least) for end in (ends.start, ends.end)):
        raise UserError(f"{where}: must be {'above' if above else 'at least'} {least:g} and finite, got {value}")

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        gone = jnp.clip(step / max(1.0, ends.until * max(1, steps - 1)), 0, 1)
        return (ends.start + (ends.end - ends.start) * SHAPES[name](gone)).astype(jnp.float32)

    if ends.start == ends.end:
        return lambda step: jnp.asarray(ends.start, jnp.float32)
    return at
