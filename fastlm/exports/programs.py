"""What a model is outside: a few functions of its weights and arrays by name, with no type of this code in them.

Notable: weights and caches are flat dicts from path to array, so that a program's inputs have names anywhere. Lengths
are symbols where the kinds of attention allow it: those that go by the length of rows have a fixed one. Dropout,
captures and statistics are left out. A decoder has three programs: "forward" scores whole rows; "prefill" reads
right-padded prompts into an empty cache; "decode" takes one token more for each row.

Dims: b rows, t tokens, s source tokens, c slots of a cache, V vocab.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Int

from fastlm.decoding import inputs
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.models import attention as attention_kinds
from fastlm.ops import paths
from fastlm.ops.caches import Cache, Memory

SLOTS, SOURCE = 1_000_003, 523  # sizes, twice and four times, that no width or window of a model is
GROUPED = "a kind of attention of this model keeps tokens in groups, a cache that cannot be exported yet"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function `call(weights, inputs) -> outputs`, both dicts of arrays, and what they may be.

    Attributes:
      inputs: shapes with symbols, and types; by name.
      outputs: names.
    """

    call: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]


def programs(
    model: Model, params: Any, length: int | None = None, *, documents: bool = False, empty: bool = False
) -> dict[str, Program]:
    """Returns a model's programs by name.

    Args:
      params: arrays or shapes.
      length: tokens of every row; None leaves that open.
      documents: whether the "forward" of a decoder takes segments, and so tells apart the documents of a row.
      empty: whether "prefill" only reads into a cache of nothing, which is faster where attention over a cache is no
        operator of the runtime's.
    """
    return _Programs(model, params, length, documents, empty).all()


@contextlib.contextmanager
def told_of(name: str) -> Iterator[None]:
    """Says in a `UserError` that a program, traced in here, is none for rows of any length."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "InconclusiveDimensionOperation":  # which jax keeps in a private module
            raise
        raise UserError(
            f"'{name}': a kind of attention of this model goes by the length of rows, which has to be fixed; give it "
            "with --length (or, if that is given, the kind goes by the number of rows or slots too, and stays here)"
        ) from None


def flat(tree: Any) -> dict[str, Any]:
    """Returns a tree as a dict from path to leaf, "layers/0/attention/q"."""
    return paths.flatten(tree)


class _Programs:
    def __init__(self, model: Model, params: Any, length: int | None, documents: bool, empty: bool) -> None:
        self._model, self._weights = model, jax.tree.structure(params)
        self._documents = documents and model.cfg.family == "decoder"
        self._empty = empty
        # Symbols that a program has no array for may not stand in its constraints, so those with a cache by slot have
        # a scope of their own.
        self._slotted = self._cache_has_slots()
        self._length = length
        self._open_scope(slots=False)

    def _open_scope(self, slots: bool) -> None:
        told = ["t <= c"] if self._length is None else [f"c >= {self._length}"]
        self._scope = export.SymbolicScope(told if slots else [])
        self._tokens = self._symbol("t") if self._length is None else self._length

    def all(self) -> dict[str, Program]:
        family = self._model.cfg.family
        if family == "encoder":
            return {"forward": self._classify()}
        found = {"forward": self._score()}
        layers = [self._model.cfg.layer(i) for i in self._model.cfg.stack]
        if all(attention_kinds.kind(layer.attention).decode for layer in layers):
            self._open_scope(self._slotted)
            found["prefill"] = self._prefill()
            self._open_scope(slots=False)
            found["decode"] = self._decode()
        return found

    def _symbol(self, name: str) -> Any:
        return export.symbolic_shape(name, scope=self._scope)[0]

    def _array(self, *shape: str | int | Any, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        sized = (self._symbol(size) if isinstance(size, str) else size for size in shape)
        return jax.ShapeDtypeStruct(tuple(sized), dtype)

    def _params(self, weights: dict[str, Any]) -> Any:
        return jax.tree.unflatten(self._weights, list(weights.values()))

    @property
    def _source(self) -> dict[str, jax.ShapeDtypeStruct]:
        if self._model.cfg.family != "encoder_decoder":
            return {}
        return {"source": self._array("b", "s"), "source_segments": self._array("b", "s")}

    def _read_source(self, params: Any, given: dict[str, Any]) -> Memory | None:
        if "source" not in given:
            return None
        return self._model.encode(params, given["source"], segment_ids=given["source_segments"])[0]

    def _classify(self) -> Program:
        model = self._model
        output = {"sequence": "logits", "tokens": "logits", "masked_language_model": "logits"}.get(
            model.cfg.head, "hidden"
        )

        def call(weights, given):
            params = self._params(weights)
            types = {"token_types": given["token_types"]} if "token_types" in given else {}
            hidden, _ = model.features(params, given["tokens"], segment_ids=given["segments"], packed=False, **types)
            if model.cfg.head == "sequence":
                hidden = model.pool(hidden, given["segments"])
            return {output: model.head(params, hidden) if output == "logits" else hidden}

        inputs = {"tokens": self._array("b", self._tokens), "segments": self._array("b", self._tokens)}
        if model.cfg.token_types:
            inputs["token_types"] = self._array("b", self._tokens)
        return Program(call, inputs, (output,))

    def _score(self) -> Program:
        def call(weights, given):
            params = self._params(weights)
            memory = self._read_source(params, given)
            places = {}
            if "segments" in given:
                places = {"segment_ids": given["segments"], "positions": _positions(given["segments"])}
            hidden, _ = self._model.features(params, given["tokens"], memory=memory, **places)
            return {"logits": self._model.head(params, hidden)}

        tokens = {name: self._array("b", self._tokens) for name in ("tokens", *["segments"] * self._documents)}
        return Program(call, tokens | self._source, ("logits",))

    def _two_caches(self) -> tuple[Cache, Cache]:
        """Two sizes of everything: what differs between them is a symbol, whatever a kind keeps."""
        empty = self._model.empty_cache
        small, large = (jax.eval_shape(lambda n=n: empty(n, SLOTS * n, SOURCE * n)) for n in (2, 4))
        return small, large

    def _cache_has_slots(self) -> bool:
        family, layers = self._model.cfg.family, map(self._model.cfg.layer, self._model.cfg.stack)
        if family == "encoder" or not all(attention_kinds.kind(layer.attention).decode for layer in layers):
            return False
        return any(2 * SLOTS in leaf.shape for leaf in jax.tree.leaves(self._two_caches()[0]))

    def _cache(self) -> "_CacheForm":
        small, large = self._two_caches()
        if jax.tree.structure(small) != jax.tree.structure(large.replace(slots=small.slots)):
            raise UserError(GROUPED)
        room = {2: "b", 2 * SLOTS: "c", 2 * SOURCE: "s"}

        def shape(one, two):
            sizes = [a if a == b else room.get(a) for a, b in zip(one.shape, two.shape)]
            if None in sizes:
                raise UserError(GROUPED)
            return self._array(*sizes, dtype=one.dtype)

        shapes = jax.tree.map(shape, small, large.replace(slots=small.slots))
        slots = self._symbol("c") if self._slotted else self._model.cfg.max_length
        return _CacheForm(_named(flat(shapes)), jax.tree.structure(small), slots)

    def _prefill(self) -> Program:
        whole = self._cache()

        def call(weights, given):
            params = self._params(weights)
            memory = self._read_source(params, given)
            cache = whole.build(given)
            prompts = inputs.Inputs(given["tokens"], given["lengths"])
            cache, logits = inputs.read(self._model, params, cache, prompts, memory, empty=self._empty)
            return {"logits": logits, **_named(flat(cache))}

        tokens = {"tokens": self._array("b", self._tokens), "lengths": self._array("b")}
        return Program(call, tokens | self._source | whole.shapes, ("logits", *whole.shapes))

    def _decode(self) -> Program:
        whole = self._cache()

        def call(weights, given):
            params = self._params(weights)
            cache = whole.build(given)
            hidden, aux = self._model.features(params, given["token"][:, None], cache=cache)
            return {"logits": self._model.head(params, hidden[:, 0]), **_named(flat(aux["cache"]))}

        return Program(call, {"token": self._array("b")} | whole.shapes, ("logits", *whole.shapes))


@dataclasses.dataclass(frozen=True)
class _CacheForm:
    """A cache as a dict of arrays: their shapes, and how it is put together."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    tree: Any
    slots: Any

    def build(self, given: dict[str, Any]) -> Cache:
        """Returns the cache."""
        return jax.tree.unflatten(self.tree, [given[path] for path in self.shapes]).replace(slots=self.slots)


def _positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the place of each token in its document."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def _named(cache: dict[str, Any]) -> dict[str, Any]:
    return {f"cache/{path}": leaf for path, leaf in cache.items()}
