"""A program as one flat list of operations, those that a runtime has as one still named.

Notable: jit, custom derivatives, rematerialisation and short loops are opened; an operator (`ops.operators`) stays one
equation if the runtime takes it, else it is opened too. Causal attention is joined with what surrounds it, rotating
queries and keys and writing these into a cache by slot, to one operator: runtimes that have it move no keys but the
new ones. Every stage is a jaxpr that computes what the program does, so each can be run against it.

Dims: B batch, T query time, S slots, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, Int

from fastlm.models import positions
from fastlm.ops import attention, caches, operators
from fastlm.ops.caches import KVCache
from fastlm.ops.masks import MaskSpec
from fastlm.ops.operators import Call, operator
from fastlm.ops.softmax import Exact

# Calls by the name of their primitive, and where the function that they call stands.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}
Keeps = Callable[[Call, Sequence[Any]], bool]
OPERATOR = operators.primitive.name
UNROLLED = 64  # steps of a loop that are written one after the other


@operator
def cached_attention(
    q: Float[Array, "B T NH"],
    k: Float[Array, "B T KH"],
    v: Float[Array, "B T KH"],
    past: KVCache,
    start: Int[Array, "B"],
    lengths: Int[Array, "B"] | None,
    *,
    width: int,
    scale: float,
    cap: float,
    rotary: dict[str, Any] | None,
) -> tuple[Float[Array, "B T NH"], KVCache]:
    """Rotates queries and keys, writes keys and values behind the `start` tokens of each row, attends causally.

    Args:
      width: of a head, H.
      lengths: how many of the T tokens are real, None for all.
      rotary: what `positions.rotary_angles` takes beside positions; None does not rotate.
    """
    q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in (q, k, v))
    if rotary is not None:
        angles = positions.rotary_angles(start[:, None] + jnp.arange(q.shape[1]), **rotary)
        q, k = positions.rotate(q, *angles), positions.rotate(k, *angles)
    cache = past.write(k, v, start)
    mask = MaskSpec(True, offset=start, lengths=lengths)
    y = attention.dot_product_attention(q, cache.k, cache.v, mask, scale=scale, cap=cap, form="plain")
    return y.reshape(*y.shape[:2], -1), cache


@operator
def rotated_attention(
    q: Float[Array, "B T NH"],
    k: Float[Array, "B T KH"],
    v: Float[Array, "B T KH"],
    *,
    width: int,
    scale: float,
    cap: float,
    rotary: dict[str, Any],
) -> Float[Array, "B T NH"]:
    """Rotates queries and keys of whole rows, heads of H = `width`, and attends causally; see `cached_attention`."""
    q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in (q, k, v))
    angles = positions.rotary_angles(jnp.arange(q.shape[1])[None], **rotary)
    q, k = positions.rotate(q, *angles), positions.rotate(k, *angles)
    y = attention.dot_product_attention(q, k, v, MaskSpec(True), scale=scale, cap=cap, form="plain")
    return y.reshape(*y.shape[:2], -1)


def flatten(call: Callable, shapes: Sequence[Any], keeps: Keeps) -> core.ClosedJaxpr:
    """Traces `call(*shapes)`, opens all calls in it, and joins what belongs to a `cached_attention`.

    Args:
      keeps: of an operator's call and the shapes of its inputs, whether it stays one.

    Returns:
      a function of the leaves of `shapes` that gives the leaves of the result.
    """
    with operators.named():
        whole = jax.make_jaxpr(call)(*shapes)
        opened = _retraced(whole, lambda *leaves: _evaluate(whole.jaxpr, whole.consts, leaves, lambda *_: True))
        items = _live(_joined(opened.jaxpr, keeps), opened.jaxpr.outvars)
        joined = _retraced(opened, lambda *leaves: _run(items, opened, leaves))
        return _retraced(joined, lambda *leaves: _apart(leaves, _evaluate(joined.jaxpr, joined.consts, leaves, keeps)))


def _apart(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Copies outputs that are inputs: a graph has no value that is both."""
    return [jnp.array(x, copy=True) if any(x is given for given in inputs) else x for x in outputs]


def _retraced(closed: core.ClosedJaxpr, function: Callable) -> core.ClosedJaxpr:
    """Traces another function of the same inputs."""
    return jax.make_jaxpr(function)(
        *(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars)
    )


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], leaves: Sequence[Any], keeps: Keeps) -> list[Any]:
    """Runs a jaxpr equation by equation, calls opened."""
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, leaves, strict=True))
    for equation in jaxpr.eqns:
        given, params = [_read(values, var) for var in equation.invars], equation.params
        inner = params.get(_CALLS.get(equation.primitive.name, ""))
        if equation.primitive.name == OPERATOR:
            kept = keeps(params["call"], [var.aval for var in equation.invars])
            inner = None if kept else params["jaxpr"]
        if inner is None:
            out = _unrolled(equation, given, keeps) if _is_short_scan(equation) else _bind(equation, given)
        else:
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            out = _evaluate(closed.jaxpr, closed.consts, given, keeps)
        values.update(zip(equation.outvars, out, strict=True))
    return [_read(values, var) for var in jaxpr.outvars]


def _is_short_scan(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name == "scan" and equation.params["length"] <= UNROLLED


def _unrolled(equation: core.JaxprEqn, given: Sequence[Any], keeps: Keeps) -> list[Any]:
    """Runs a loop over a few steps one step after the other.

    What is constant, carried and taken step by step is told by ranks: versions of jax name it differently.
    """
    params, body = equation.params, equation.params["jaxpr"]
    longer = lambda outer, inner: outer.aval.ndim > inner.aval.ndim
    carries = len(given) - sum(map(longer, equation.invars, body.jaxpr.invars))
    carried = len(equation.outvars) - sum(map(longer, equation.outvars, body.jaxpr.outvars))
    consts = carries - carried
    carry, steps = list(given[consts:carries]), []
    for step in range(params["length"])[:: -1 if params["reverse"] else 1]:
        slices = [jax.lax.index_in_dim(x, step, keepdims=False) for x in given[carries:]]
        out = _evaluate(body.jaxpr, body.consts, [*given[:consts], *carry, *slices], keeps)
        carry = out[:carried]
        steps.append(out[carried:])
    in_order = steps[::-1] if params["reverse"] else steps
    return [*carry, *(jnp.stack(values) for values in zip(*in_order, strict=True))]


def _read(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else values[var]


def _bind(equation: core.JaxprEqn, given: Sequence[Any]) -> Sequence[Any]:
    out = equation.primitive.bind(*given, **equation.params)
    return out if equation.primitive.multiple_results else [out]


@dataclasses.dataclass(frozen=True)
class _Item:
    """A piece of a program: `run(*values of takes) -> values of gives`."""

    takes: tuple[Any, ...]
    gives: tuple[Any, ...]
    run: Callable[..., Sequence[Any]]


def _run(items: Sequence[_Item], closed: core.ClosedJaxpr, leaves: Sequence[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, leaves, strict=True))
    for item in items:
        values.update(zip(item.gives, item.run(*(_read(values, var) for var in item.takes)), strict=True))
    return [_read(values, var) for var in jaxpr.outvars]


def _live(items: Sequence[_Item], wanted: Sequence[Any]) -> list[_Item]:
    """Leaves out what nothing wanted needs."""
    needed = {var for var in wanted if not isinstance(var, core.Literal)}
    kept = []
    for item in reversed(items):
        if needed & set(item.gives):
            kept.append(item)
            needed -= set(item.gives)
            needed |= {var for var in item.takes if not isinstance(var, core.Literal)}
    return kept[::-1]


def _joined(jaxpr: core.Jaxpr, keeps: Keeps) -> list[_Item]:
    """Returns the equations as items, each attention over a cache as one; what it made useless is still there."""
    program = _Program(jaxpr)
    items, joined = [], set()
    for equation in jaxpr.eqns:
        found = program.joined(equation)
        if found is not None and keeps(*found[1]):
            items.append(found[0])
            joined |= set(found[0].gives)
        elif not joined & set(equation.outvars):
            run = lambda *given, equation=equation: _bind(equation, given)
            items.append(_Item(tuple(equation.invars), tuple(equation.outvars), run))
    return items


def _options(told: dict[str, Any], rotary: dict[str, Any] | None) -> dict[str, Any]:
    return {"width": told["q"].aval.shape[-1], "scale": told["scale"], "cap": told["cap"], "rotary": rotary}


class _Program:
    """Where the variables of a flat jaxpr come from, and who uses them."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self._makers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
        variables = lambda given: (var for var in given if not isinstance(var, core.Literal))
        self._uses = Counter(var for equation in jaxpr.eqns for var in variables(equation.invars))
        self._readers = {var: equation for equation in jaxpr.eqns for var in variables(equation.invars)}
        self._outputs = set(variables(jaxpr.outvars))

    def joined(self, equation: core.JaxprEqn) -> tuple[_Item, tuple[Call, list[Any]]] | None:
        """Returns causal attention with what is around it as one item, and what a runtime is asked; None if it is none.

        Without segments, positions count from the first token on, or from the cache's last.
        """
        told = self._operator(equation, attention.dot_product_attention)
        if not told or told["bias"] is not None or told["softmax"] != Exact():
            return None
        if not told["mask"].causal or told["mask"].query_segments is not None:
            return None
        return self._whole(equation, told) if told["mask"].offset is None else self._cached(equation, told)

    def _whole(self, equation: core.JaxprEqn, told: dict[str, Any]) -> tuple[_Item, tuple[Call, list[Any]]] | None:
        q, k, rotary = self._unrotated(told["q"], told["k"])
        if rotary is None or told["v"].aval.shape != told["k"].aval.shape:
            return None
        options = _options(told, rotary)
        attend = functools.partial(rotated_attention, **options)
        return self._item(
            equation,
            [q, k, told["v"]],
            [],
            lambda *given: (attend(*given),),
            Call(rotated_attention.__qualname__, options),
        )

    def _cached(self, equation: core.JaxprEqn, told: dict[str, Any]) -> tuple[_Item, tuple[Call, list[Any]]] | None:
        kept = [self._by_head(told[name]) for name in ("k", "v")]
        k, v = (self._made_by(var, caches.written_by_head) for var in kept)
        if not k or not v or told["mask"].offset is not k["offset"] or told["mask"].offset is not v["offset"]:
            return None
        if self._uses[told["k"]] != 1 or self._uses[told["v"]] != 1:
            return None
        q, new, rotary = self._unrotated(told["q"], k["new"])
        options = _options(told, rotary)

        def attend(q, new, value, past_k, past_v, start, lengths=None):
            y, cache = cached_attention(q, new, value, KVCache(past_k, past_v), start, lengths, **options)
            return y, cache.keys, cache.values

        lengths = [] if told["mask"].lengths is None else [told["mask"].lengths]
        rest = [k["slots"], v["slots"], k["offset"], *lengths]
        call = Call(cached_attention.__qualname__, options)
        return self._item(equation, [q, new, v["new"]], rest, attend, call, kept)

    def _by_head(self, var: Any) -> Any:
        """Returns keys or values of attention as a cache keeps them, with heads before slots."""
        maker = self._maker(var)
        swapped = (
            maker is not None and maker.primitive.name == "transpose" and maker.params["permutation"] == (0, 2, 1, 3)
        )
        return maker.invars[0] if swapped else None

    def _item(self, equation, heads, rest, attend, call, more=()) -> tuple[_Item, tuple[Call, list[Any]]]:
        """Returns attention of heads side by side as an item that fits the program, where they may be told apart."""
        y = equation.outvars[0]
        out = self._flattened(y)

        def run(q, k, v, *given):
            flat = [x if x.ndim == 3 else x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
            attended, *written = attend(*flat, *given)
            return [attended if out is not None else attended.reshape(y.aval.shape), *written]

        item = _Item((*map(self._unheaded, heads), *rest), (y if out is None else out, *more), run)
        return item, (call, [var.aval for var in (*heads, *rest)])

    def _operator(self, equation: core.JaxprEqn | None, function: Callable) -> dict[str, Any] | None:
        """Returns the arguments of an operator, variables in the place of slots; None if it is another."""
        if equation is None or equation.primitive.name != OPERATOR:
            return None
        call = equation.params["call"]
        if call.name != function.__qualname__:
            return None
        return call.filled(equation.invars)

    def _maker(self, var: Any) -> core.JaxprEqn | None:
        return None if isinstance(var, core.Literal) else self._makers.get(var)

    def _made_by(self, var: Any, function: Callable) -> dict[str, Any] | None:
        return self._operator(self._maker(var), function)

    def _unrotated(self, q: Any, k: Any) -> tuple[Any, Any, dict[str, Any] | None]:
        """Returns queries and keys before they were rotated alike, and how that was."""
        told_q, told_k = self._made_by(q, positions.rotate), self._made_by(k, positions.rotate)
        if not told_q or not told_k or told_q["cos"] is not told_k["cos"]:
            return q, k, None
        angles = self._made_by(told_q["cos"], positions.rotary_angles)
        if not angles:
            return q, k, None
        return told_q["x"], told_k["x"], {name: value for name, value in angles.items() if name != "positions"}

    def _unheaded(self, var: Any) -> Any:
        """Returns heads side by side as they were before they were told apart, where that is how they came."""
        maker = self._maker(var)
        if maker is None or maker.primitive.name != "reshape" or maker.invars[0].aval.ndim != 3:
            return var
        return maker.invars[0]

    def _flattened(self, y: Any) -> Any:
        """Returns what the heads are joined to, if nothing else is made of them."""
        reader = self._readers.get(y)
        alone = self._uses[y] == 1 and y not in self._outputs
        return reader.outvars[0] if alone and reader.primitive.name == "reshape" else None
