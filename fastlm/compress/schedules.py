"""Values that change while a run goes on: weights of terms, temperatures, shares.

A config gives a number, or "linear(start=0.9, end=0.5)" or "cosine(...)", with `begin=0.1, until=0.5` to go the way
between these shares of the run; "cubic(...)" is fast first and slow last, as sparsity is raised (arXiv 1710.01878);
"switch(start=1, end=0, until=0.5)" keeps its start until then, and has its end from there on.
"""

import contextlib
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
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "switch": jnp.floor,
}


@dataclasses.dataclass(frozen=True)
class Ends:
    """From `start`, until the share `begin` of all steps, to `end`, from the share `until` on."""

    start: float
    end: float
    until: float = 1.0
    begin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.until <= 1 or not math.isfinite(self.start) or not math.isfinite(self.end):
            raise UserError(f"start and end must be numbers, and 0 <= begin < until <= 1; got {self}")


def make(
    value: float | str, steps: int, where: str, *, least: float = 0.0, above: bool = False, most: float = math.inf
) -> Schedule:
    """Returns step -> value.

    Args:
      steps: of the whole run.
      where: the config's key, for messages.
      least: what no value may be below (nor equal, if `above`).
      most: what no value may be above.

    Raises:
      UserError: neither a number nor a schedule, or out of range.
    """
    with contextlib.suppress(ValueError):  # a key that holds a schedule takes a number as text
        value = float(value)
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
    if max(ends.start, ends.end) > most:
        raise UserError(f"{where}: must be at most {most:g}, got {value}")

    last = max(1, steps - 1)

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        gone = jnp.clip((step - ends.begin * last) / max(1.0, (ends.until - ends.begin) * last), 0, 1)
        return (ends.start + (ends.end - ends.start) * SHAPES[name](gone)).astype(jnp.float32)

    if ends.start == ends.end:
        return lambda step: jnp.asarray(ends.start, jnp.float32)
    return at
