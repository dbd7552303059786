"""From a flat program to an ONNX graph, by jax2onnx; operators become one node each, of a domain of their own.

Notable: jax2onnx replaces parts of jax.numpy while it traces, and what jit caches of such traces would stay behind. It
is given a list of plain equations (`tracing`), in which nothing is left to replace. Weights are inputs of the graph:
so it never sees their values, and writes nothing but the graph. What it writes with a dozen nodes that compute sizes
(changes of shape), or not at all where a size is a symbol (fillings up, remainders), is an operator too.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import onnx
from jax import export
from jax.extend import core

from fastlm.errors import UserError, first_line
from fastlm.ops.operators import Call, Slot, primitive

DOMAIN = "fastlm"
OPSET = 23


@dataclasses.dataclass
class Converted:
    """A graph with operators in it.

    Attributes:
      model: weights and inputs are its inputs; nodes of `DOMAIN` are operators.
      operators: by their `op_type`, the call and the shapes of what it takes.
    """

    model: onnx.ModelProto
    operators: dict[str, tuple[Call, list[tuple[Any, ...]]]]


def convert(flat: core.ClosedJaxpr, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Converted:
    """Returns the graph of a program.

    Raises:
      UserError: an operation of the program has no form in ONNX.
    """
    import jax2onnx  # takes seconds, and only here

    converted = Converted(onnx.ModelProto(), {})
    replaced = _register(converted)
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in flat.jaxpr.invars]
    replay = lambda *leaves: core.jaxpr_as_fun(flat)(*leaves)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it tells of values without a type, which ours are
    try:
        converted.model = jax2onnx.to_onnx(
            replay, shapes, model_name=name, opset=OPSET, input_names=inputs, output_names=outputs
        )
    except Exception as error:  # of any type, whatever in the program it did not expect
        raise UserError(f"this model's '{name}' cannot be written as ONNX: {first_line(error)}") from None
    finally:
        replaced()
    return converted


def _register(converted: Converted) -> Any:
    """Has jax2onnx write operators into nodes of their own; returns what undoes that."""
    from jax2onnx.plugins.plugin_system import PLUGIN_REGISTRY, PrimitiveLeafPlugin, import_all_plugins

    class Operators(PrimitiveLeafPlugin):
        """Writes what `call` makes of an equation, else what jax2onnx does."""

        def __init__(self, call: Any, otherwise: Any = None) -> None:
            self._call, self._otherwise = call, otherwise

        def lower(self, ctx: Any, eqn: core.JaxprEqn) -> None:
            call = self._call(eqn)
            if call is None:
                self._otherwise.lower(ctx, eqn)
                return
            kind = f"Operator{len(converted.operators)}"
            converted.operators[kind] = call, [var.aval.shape for var in eqn.invars]
            given, wanted = ([ctx.get_value_for_var(var) for var in some] for some in (eqn.invars, eqn.outvars))
            names = [ctx.fresh_name(call.name) for _ in wanted]
            made = getattr(ctx.builder, kind)(*given, _outputs=names, _domain=DOMAIN)
            for var, value, target in zip(eqn.outvars, made if len(wanted) > 1 else [made], wanted, strict=True):
                value.type, value.shape = target.type, target.shape
                ctx.bind_value_for_var(var, value)

    import_all_plugins()
    before = {name: PLUGIN_REGISTRY.get(name) for name in (primitive.name, *_WRITTEN)}
    PLUGIN_REGISTRY[primitive.name] = Operators(lambda eqn: eqn.params["call"])
    for name, call in _WRITTEN.items():
        PLUGIN_REGISTRY[name] = Operators(call, before[name])
    return lambda: PLUGIN_REGISTRY.update({name: old for name, old in before.items() if old is not None})


def _reshape(eqn: core.JaxprEqn) -> Call | None:
    """A reshape that ONNX can say in numbers: 0 keeps a size, one -1 stands for what is left."""
    (x, *rest), sizes = eqn.invars, []
    if rest or isinstance(x, core.Literal):
        return None
    for place, size in enumerate(eqn.outvars[0].aval.shape):
        if isinstance(size, int) and size > 0:
            sizes.append(size)
        elif place < x.aval.ndim and x.aval.shape[place] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
    return Call("reshape", {"x": Slot(0), "sizes": sizes}) if sizes.count(-1) < 2 else None


def _add(eqn: core.JaxprEqn) -> Call | None:
    """A sum of two equal shapes of the residual stream."""
    x, y = eqn.invars
    plain = not any(isinstance(var, core.Literal) for var in (x, y)) and x.aval.dtype == "float32"
    return Call("add", {"x": Slot(0), "y": Slot(1)}) if plain and x.aval.shape == y.aval.shape else None


def _pad(eqn: core.JaxprEqn) -> Call | None:
    """A filling up, or a cutting off, at the ends, by numbers."""
    low, high, between = zip(*eqn.params["padding_config"], strict=True)
    plain = not any(between) and not any(export.is_symbolic_dim(size) for size in (*low, *high))
    return (
        Call("pad", {"x": Slot(0), "value": Slot(1), "pads": [int(size) for size in (*low, *high)]}) if plain else None
    )


def _remainder(eqn: core.JaxprEqn) -> Call:
    """A remainder with the sign of what is divided."""
    return Call("rem", {"x": Slot(0), "y": Slot(1)})


def _select(eqn: core.JaxprEqn) -> Call | None:
    """A choice between truth values, which ONNX Runtime's own operation does not make."""
    several = len(eqn.invars) == 3 and eqn.invars[0].aval.dtype == eqn.invars[1].aval.dtype == bool
    return Call("select", {"which": Slot(0), "otherwise": Slot(1), "chosen": Slot(2)}) if several else None


_WRITTEN = {"add": _add, "pad": _pad, "rem": _remainder, "reshape": _reshape, "select_n": _select}
