"""Terms of the loss of distillation, as a config names them: a call with options, and a weight.

    ("forward_kl(temperature='cosine(start=2, end=1)')", 0.5)

Notable: what a term compares is in the file of its family (`mixture`, `features`, `spans`, `blockwise`); here names
find it, and weights and temperatures become functions of the step.
"""

import dataclasses
from collections.abc import Callable

import jax

from fastlm import configuration
from fastlm.compress import schedules
from fastlm.compress.blockwise import BLOCKS, Blocks
from fastlm.compress.features import FEATURES, Feature
from fastlm.compress.mixture import CACHED, DIVERGENCES, NAME, OWN, WHERE
from fastlm.compress.spans import SPANS, SpanTerm
from fastlm.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
      name: in metrics; that of its kind, with a number where there are several.
      weight: step -> weight.
      feature: what it compares inside, if it does that.
      blocks: how it trains blocks alone, if it does that.
      divergence: how it compares distributions, if it does that; `options` of it: step -> value.
      spans: how it compares spans of text, if it does that; its temperature is in `options`.
    """

    name: str
    weight: schedules.Schedule
    feature: Feature | None = None
    blocks: Blocks | None = None
    divergence: Callable[..., jax.Array] | None = None
    options: dict[str, schedules.Schedule] = dataclasses.field(default_factory=dict)
    spans: SpanTerm | None = None


def parsed(spec: str, weight: float | str, steps: int) -> Term:
    """Reads a term and its weight, of a run of so many steps.

    Raises:
      UserError: an unknown name or option, or a value out of range.
    """
    where = f"{WHERE}.terms"
    name, values = configuration.call(spec, where)
    weighted = schedules.make(weight, steps, f"{where}: weight of '{spec}'")
    section = f"{NAME}.terms: {name}"
    if name in (OWN, CACHED) and not values:
        return Term(name, weighted)
    if name == BLOCKS:
        with configuration.naming(section):
            return Term(name, weighted, blocks=configuration.make(Blocks, section, values))
    if name in FEATURES:
        with configuration.naming(section):
            return Term(name, weighted, configuration.make(FEATURES[name], section, values))
    if name in SPANS:
        with configuration.naming(section):
            made = configuration.make(SPANS[name], section, values)
        at = schedules.make(made.temperature, steps, f"{where}: {name}: temperature", above=True)
        return Term(name, weighted, options={"temperature": at}, spans=made)
    if name not in DIVERGENCES:
        known = (OWN, CACHED, BLOCKS, *DIVERGENCES, *FEATURES, *SPANS)
        raise UserError(f"{where}: unknown term '{name}'{nearest(name, known) or '; one of: ' + ', '.join(known)}")
    divergence, kind = DIVERGENCES[name]
    options = dataclasses.asdict(configuration.make(kind, section, values))
    for option, value in options.items():
        if option != "temperature" and isinstance(value, float) and not 0 <= value <= 1:
            raise UserError(f"{where}: {name}: {option} must lie in [0, 1], got {value}")
    return Term(
        name,
        weighted,
        divergence=divergence,
        options={
            option: schedules.make(value, steps, f"{where}: {name}: {option}", above=option == "temperature")
            for option, value in options.items()
        },
    )


def named(terms: list[Term]) -> tuple[Term, ...]:
    """Numbers terms of one kind; the task's own loss is there once, if with a weight of 0.

    Raises:
      UserError: a term that stands alone of its kind is there twice.
    """
    seen: dict[str, int] = {}
    named = []
    for term in terms:
        seen[term.name] = seen.get(term.name, 0) + 1
        if term.name in (OWN, CACHED) and seen[term.name] > 1:
            raise UserError(f"{WHERE}.terms: '{term.name}' is there twice")
        number = seen[term.name]
        named.append(term if number == 1 else dataclasses.replace(term, name=f"{term.name}_{number}"))
    if OWN not in seen:
        named.append(Term(OWN, schedules.make(0.0, 1, WHERE)))
    return tuple(named)
