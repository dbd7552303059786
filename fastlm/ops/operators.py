"""Operations that other runtimes have as one: named where they are written, found by what exports.

Notable: `@operator` changes nothing about a function, until somebody traces inside `named()`: its calls then appear in
the jaxpr as one equation each, with the arguments by name, instead of the many it consists of. An exporter writes its
runtime's own operation for those it knows, and `inline` opens the others. Training and decoding never see any of it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import mlir

P = ParamSpec("P")
R = TypeVar("R")

_NAMED: contextvars.ContextVar[bool] = contextvars.ContextVar("named", default=False)

primitive = core.Primitive("fastlm_operator")
primitive.multiple_results = True
primitive.def_abstract_eval(lambda *arrays, call, jaxpr: jaxpr.out_avals)
# Only what was traced to be exported has these equations. Should such a trace be run after all, it computes the same.
primitive.def_impl(lambda *arrays, call, jaxpr: core.jaxpr_as_fun(jaxpr)(*arrays))
mlir.register_lowering(
    primitive,
    mlir.lower_fun(lambda *arrays, call, jaxpr: core.jaxpr_as_fun(jaxpr)(*arrays), multiple_results=True),
)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands for an array among the arguments of an operator: the equation's input number `index`."""

    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What an operator's equation is: the function's name and all its arguments, slots in the place of arrays."""

    name: str
    arguments: dict[str, Any]

    def filled(self, values: Sequence[Any]) -> dict[str, Any]:
        """Returns the arguments with values in the place of slots."""
        is_slot = lambda leaf: isinstance(leaf, Slot)
        fill = lambda leaf: values[leaf.index] if is_slot(leaf) else leaf
        return {name: jax.tree.map(fill, value, is_leaf=is_slot) for name, value in self.arguments.items()}


@contextlib.contextmanager
def named() -> Iterator[None]:
    """What is traced in here has operators as single equations."""
    token = _NAMED.set(True)
    try:
        yield
    finally:
        _NAMED.reset(token)


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Lets exporters see the calls of a function of arrays, which may stand in trees, and of static options."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if not _NAMED.get():
            return function(*args, **options)
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        return _bind(function, bound)

    return call


def _bind(function: Callable, bound: inspect.BoundArguments) -> Any:
    leaves, tree = jax.tree.flatten(dict(bound.arguments), is_leaf=lambda leaf: leaf is None)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
    slots = (Slot(index) for index in range(len(arrays)))
    told = [next(slots) if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves]

    def run(*values: jax.Array) -> Any:
        given = [values[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in told]
        bound.arguments.update(jax.tree.unflatten(tree, given))
        return function(*bound.args, **bound.kwargs)

    token = _NAMED.set(False)  # what an operator consists of has no operators of its own
    try:
        jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(*arrays)
    finally:
        _NAMED.reset(token)
    call = Call(function.__qualname__, jax.tree.unflatten(tree, told))
    out = primitive.bind(*arrays, call=call, jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shape), out)
