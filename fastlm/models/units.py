"""What the axes of a model's weights count: hidden units, heads and feed-forward units; and choices among them.

Notable: read off the logical axes that weights declare (see `parallel.rules`), so that whoever scores, cuts or counts
units follows every family and every kind of attention without knowing them. An axis may hold several entries a unit
(a head has head_dim columns of q), always side by side.
Left out: words, positions, classes and what is inside a head; nothing here can be made smaller along those.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastlm.errors import UserError
from fastlm.models import attention as attention_kinds
from fastlm.models.config import ModelConfig
from fastlm.models.transformer import abstract

STREAM = ("embed", "hidden", "norm")  # names of axes along which weights meet the residual stream
OF_LAYER = {"heads": "heads", "kv_heads": "kv_heads", "mlp": "feed_forward"}


class Unit(NamedTuple):
    """A row of units that are chosen together.

    Attributes:
      kind: "hidden", "heads", "kv_heads" or "feed_forward".
      layer: which one's; -1 for the hidden units, of which all layers have the same.
      part: of heads, "attention" or "cross_attention".
    """

    kind: str
    layer: int = -1
    part: str = ""


HIDDEN = Unit("hidden")


def heads(layer: int, part: str = "attention", kind: str = "heads") -> Unit:
    """Returns the query heads of an attention sublayer; with "kv_heads" its keys and values."""
    return Unit(kind, layer, part)


def feed_forward(layer: int) -> Unit:
    """Returns the feed-forward units of a layer."""
    return Unit("feed_forward", layer)


@functools.lru_cache(maxsize=32)
def axes(cfg: ModelConfig) -> Mapping[str, tuple[Unit | None, ...]]:
    """Returns by parameter path what each axis counts; None for what is no unit."""
    return {
        path: tuple(_unit(cfg, path.split("/"), name) for name in names) for path, names in abstract(cfg)[1].items()
    }


def _unit(cfg: ModelConfig, path: list[str], name: str | None) -> Unit | None:
    if name in STREAM:
        return HIDDEN
    if name not in OF_LAYER:
        return None
    if "relative_bias" in path:  # one table for a stack, whose layers have the same heads
        return heads(0 if path[0] == "encoder" else cfg.stack[0])
    kind, layer = OF_LAYER[name], int(path[1])
    return feed_forward(layer) if kind == "feed_forward" else heads(layer, path[2], kind)


@functools.lru_cache(maxsize=32)
def counts(cfg: ModelConfig) -> Mapping[Unit, int]:
    """Returns how many units there are of each."""
    found = {HIDDEN: cfg.width}
    for i in range(cfg.total_layers):
        layer = cfg.layer(i)
        for part in attention_parts(cfg, i):
            found |= {heads(i, part): layer.heads, heads(i, part, "kv_heads"): layer.kv_heads}
        found[feed_forward(i)] = layer.feed_forward_width
    return found


def attention_parts(cfg: ModelConfig, i: int) -> tuple[str, ...]:
    """Returns the attention sublayers of layer `i`."""
    return ("attention", "cross_attention") if cfg.layer(i).cross else ("attention",)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Units of a model to keep, ascending numbers from 0; what is not named stays whole.

    Attributes:
      hidden: of the D units of the residual stream, the same in all layers.
      heads: layer -> query heads of its self-attention. A group of heads that share a key goes with its key and value
        where none of its heads is kept; the other groups keep as many heads each.
      cross_heads: layer -> those of its cross-attention; as many heads and groups as of its self-attention.
      feed_forward: layer -> feed-forward units.
    """

    hidden: Sequence[int] | None = None
    heads: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    cross_heads: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    feed_forward: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)


def chosen(cfg: ModelConfig, kept: Kept) -> dict[Unit, np.ndarray]:
    """Returns the numbers of the units to keep, of those that `kept` names.

    Raises:
      UserError: no such unit, or units that do not go together.
    """
    found: dict[Unit, Sequence[int]] = {}
    if kept.hidden is not None:
        found[HIDDEN] = checked(kept.hidden, cfg.width, "hidden units")
    for name in ("heads", "cross_heads", "feed_forward"):
        for i in getattr(kept, name):
            if not 0 <= i < cfg.total_layers or (name == "cross_heads" and not cfg.layer(i).cross):
                raise UserError(
                    f"{name} of layer {i}: the model has none there; its layers are 0 to {cfg.total_layers - 1}"
                )
    for i, numbers in kept.feed_forward.items():
        where = f"feed-forward units of layer {i}"
        found[feed_forward(i)] = checked(numbers, cfg.layer(i).feed_forward_width, where)
    for part, by_layer in (("attention", kept.heads), ("cross_attention", kept.cross_heads)):
        for i, numbers in by_layer.items():
            found[heads(i, part)] = checked(numbers, cfg.layer(i).heads, f"{part} heads of layer {i}")
            found[heads(i, part, "kv_heads")] = _groups(cfg, i, part, numbers)
    _check_together(cfg, found)
    return {unit: np.asarray(numbers, np.int32) for unit, numbers in found.items()}


def _groups(cfg: ModelConfig, i: int, part: str, heads: Sequence[int]) -> tuple[int, ...]:
    """Returns the groups that have any of these heads."""
    layer = cfg.layer(i)
    of_group = np.bincount(np.asarray(heads) // (layer.heads // layer.kv_heads), minlength=layer.kv_heads)
    if len(set(of_group[of_group > 0])) > 1:
        raise UserError(
            f"{part} heads of layer {i}: {shown(heads)} are unequally many of the groups that share a key "
            f"({', '.join(map(str, of_group))}); keep as many of each, or none"
        )
    kind = attention_kinds.kind(getattr(layer, part), part)
    if kind.module.two_ways(layer) and 2 * sum(n < layer.heads // 2 for n in heads) != len(heads):
        raise UserError(
            f"{part} heads of layer {i}: the first half of '{getattr(layer, part)}' reads forwards, the second "
            "backwards; keep as many of each half"
        )
    return tuple(int(group) for group in np.flatnonzero(of_group))


def _check_together(cfg: ModelConfig, found: Mapping[Unit, Sequence[int]]) -> None:
    """Checks what several sublayers have in common: one number of heads in a layer, one table of biases in a stack."""
    count = lambda unit: len(found[unit]) if unit in found else counts(cfg)[unit]
    for i in range(cfg.total_layers):
        for kind in ("heads", "kv_heads"):
            sizes = [count(heads(i, part, kind)) for part in attention_parts(cfg, i)]
            if len(set(sizes)) > 1:
                raise UserError(
                    f"layer {i}: {sizes[0]} {kind} of self-attention and {sizes[1]} of cross-attention; keep as many"
                )
    for stack in (cfg.encoder_stack, cfg.stack):
        choices = {tuple(found.get(heads(i), ())) for i in stack}
        if cfg.positions == "relative" and len(choices) > 1:
            raise UserError(
                "heads: with relative positions the layers of a stack share one table; keep the same in all"
            )


def checked(numbers: Sequence[int], of: int, what: str) -> tuple[int, ...]:
    """Returns `numbers` as a tuple if they are ascending, each once, and among the first `of` from 0.

    Raises:
      UserError: they are not, or there are none.
    """
    numbers = tuple(int(n) for n in numbers)
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= of:
        raise UserError(f"{what} {shown(numbers)}: give ascending numbers from 0 to {of - 1}, each once, at least one")
    return numbers


def shown(numbers: Sequence[int]) -> str:
    """Returns numbers as a message has them."""
    return ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "") or "(none)"
