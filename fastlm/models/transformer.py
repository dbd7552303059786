"""The Transformer: `Model` composes embeddings, unrolled blocks, final norm and head of three families.

Notable: Linen modules are used purely and one block at a time. Parameters are nested dicts,
`layers/3/attention/q`, and the stack is a Python loop over `Block.apply`, so layers may differ,
any block can be called alone, and rematerialisation wraps one pure function.
`features` and `head` are the seam between model and loss; an encoder-decoder has `encode` before
them. Layers are numbered through, the encoder's first; what else the encoder has of its own stands
under `encoder/`. Nothing is hidden: caches, random keys and captures go in and come out.
Left out: scan over layers (24 unrolled layers compile in seconds, and layers may differ).

Dims: B batch, T time, S source time, D embed, V vocab.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import attention as attention_kinds
from fastlm.models import formats
from fastlm.models import positions as position_encodings
from fastlm.models.block import Block, dropout
from fastlm.models.config import Compute, ModelConfig
from fastlm.models.embedding import Embedding, RelativeBias
from fastlm.models.heads import Classes, Pooler, Vocabulary, pool
from fastlm.models.norms import Norm
from fastlm.ops.caches import Cache, Memory
from fastlm.ops.contract import PRODUCT
from fastlm.ops.masks import MaskSpec
from fastlm.ops.softmax import make as make_softmax
from fastlm.parallel.rules import constrain

CAPTURES = ("hidden", "attention", "qkv")
ACTIVATION = ("batch", "length", "hidden")

Params = dict[str, Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


@functools.partial(jax.jit, static_argnums=0)
def _run_block(block: Block, params: Params, x: Array, context: dict[str, Any]) -> tuple[Array, Any, dict]:
    """Applies a block. Under `jit` because equal layers are then traced once; the compiler inlines them."""
    run = lambda p, x, context: block.apply({"params": p}, x, **context)
    if block.compute.remat != "none":
        run = jax.checkpoint(run, policy=_REMAT_POLICIES[block.compute.remat])
    return run(params, x, context)


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer as pure functions of its parameters. Hashable, so usable as a static argument."""

    cfg: ModelConfig
    compute: Compute = Compute()

    captures = CAPTURES

    def __post_init__(self) -> None:
        if self.cfg.vocab_size < 1:
            raise UserError("config.model.vocab_size: 0 is filled in from the tokenizer; without one, give it")
        if self.cfg.head in ("sequence", "tokens") and self.cfg.classes < 1:
            raise UserError(f"config.model.classes: 0 is filled in from the task; a '{self.cfg.head}' head needs some")
        for i in range(self.cfg.total_layers):
            attention_kinds.check_layer(self.cfg.layer(i), self.cfg.positions)
        if self.cfg.in_use() != self.cfg:
            raise UserError(f"config.model.formats: {self.cfg.formats}: a form for disk alone cannot be computed with")
        form = self.compute.attention_form
        if form in ("fused", "splash") and not make_softmax(self.cfg.softmax).fused:
            raise UserError(
                f"config.model.softmax: '{self.cfg.softmax}' needs all scores of a row, which the kernels of "
                f"config.compute.attention_form '{form}' never have; use 'exact', or form 'plain'"
            )

    # --- parts -----------------------------------------------------------------------------------

    def init(self, rng: Array) -> Params:
        """Returns fresh parameters (float32 arrays in nested dicts)."""
        params = nn.meta.unbox(self._boxed(rng))
        return formats.applied(self.cfg.formats, params, _plain(self.cfg)[1], lambda form, w: form.of(w))[0]

    def embed(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds tokens of the only, or the decoder's, stack."""
        return Embedding(self.cfg, self.compute).apply({"params": params["embedding"]}, tokens, positions, token_types)

    def block(self, params: Params, i: int, x: Float[Array, "B T D"], **context: Any) -> tuple[Array, Any, dict]:
        """Runs block `i` alone; see `Block` for `context` (positions, mask, bias, memory, cache, rng, capture)."""
        capture = context.pop("capture", frozenset())
        block = Block(self.cfg.layer(i), self.compute, capture)
        return _run_block(block, params["layers"][str(i)], x, context)

    def final_norm(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalizes after the last block (pre-norm stacks only; post-norm ones end normalized)."""
        if self.cfg.norm_place == "post":
            return x.astype(self.compute.jnp_dtype)
        return self._final_norm().apply({"params": params["final_norm"]}, x)

    def head_params(self, params: Params) -> Params:
        """Returns the part of the parameters that `head` uses."""
        needed = {name: params[name] for name in ("head", "pooler") if name in params}
        if self._tied:
            needed["embedding"] = {"table": params["embedding"]["table"]}
        return needed

    def pool(self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
        """Returns the vector that stands for each text: what a "sequence" head, or a sentence embedding, reads."""
        return pool(hidden, segment_ids, self.cfg.pooling)

    def head(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns logits in float32: over V, or over classes; of pooled vectors where the head is "sequence"."""
        cfg, head = self.cfg, {"params": params.get("head", {})}
        if cfg.head == "none":
            raise ValueError("this model has no head; read `features`")
        if cfg.head == "sequence" and cfg.pooler:
            hidden = Pooler(cfg).apply({"params": params["pooler"]}, hidden)
        if cfg.head in ("sequence", "tokens"):
            return Classes(cfg).apply(head, hidden)
        return self._vocabulary().apply(head, hidden, params["embedding"]["table"] if self._tied else None)

    # --- wholes ----------------------------------------------------------------------------------

    def encode(
        self,
        params: Params,
        source: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        rng: Array | None = None,
        capture: Iterable[str] = (),
    ) -> tuple[Memory, dict[str, Any]]:
        """Runs the encoder of an encoder-decoder; `segment_ids` is 0 for padding.

        Returns:
          (memory for `features`, aux with what `capture` names, one entry per encoder layer).
        """
        cfg, capture = self.cfg, self._captures(capture)
        if segment_ids is None:
            segment_ids = jnp.ones_like(source)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(source.shape[1], dtype=jnp.int32), source.shape)
        own, table = params["encoder"], params["embedding"]["table"]
        embedding = Embedding(cfg, self.compute)
        x = embedding.apply({"params": own.get("embedding", {})}, source, positions, None, table)
        x = dropout(x, cfg.dropout, None if rng is None else jax.random.fold_in(rng, cfg.total_layers + 1))
        mask = MaskSpec(False, segment_ids, segment_ids, packed=False)
        bias = self._biases(own, cfg.encoder_stack, positions, positions)
        x, _, aux = self._stack(params, cfg.encoder_stack, x, bias, rng, capture, positions=positions, mask=mask)
        return Memory(self.final_norm(own, x), segment_ids), aux

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        lengths: Int[Array, "B"] | None = None,
        empty: bool = False,
        packed: bool = True,
        rng: Array | None = None,
        capture: Iterable[str] = (),
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Runs everything below the head.

        Args:
          positions: place of each token in its document; by default 0, 1, ... (after the cache).
          segment_ids: document number of each token within its row, 0 for padding; None is one document.
          token_types: BERT's segment types; by default all 0.
          memory: an encoder-decoder's encoded source; needed unless the cache has seen it.
          cache: what `empty_cache` made; the tokens continue it. With segments too, only a row's first document
            does, and what is returned goes on from its last: that is how memory is carried from batch to batch.
          lengths: with a cache, how many tokens of each row are real; the rest pad a ragged batch of prompts.
          empty: promises that the cache holds nothing yet: tokens then see one another alone, in whatever way is
            fastest for a row without a cache, instead of all the slots.
          packed: a row may hold several documents; False promises one, so that `segment_ids` say only what is padding,
            which every kind of attention can leave out.
          rng: key for dropout; None runs deterministically.
          capture: which of `captures` to return in `aux`, one entry per layer.

        Returns:
          (hidden, aux); `aux["cache"]` is the advanced cache if one was given.

        Raises:
          UserError: a capture that does not exist, packed rows for a kind that cannot keep them apart, or segments
            and a cache for one that cannot carry it on; rows of no token; a cache that is full, where its lengths are
            known (outside jit).
          ValueError: a decoder without anything encoded.
        """
        cfg, capture = self.cfg, self._captures(capture)
        _check_room(cfg, cache if segment_ids is None else None, tokens.shape[1])
        if segment_ids is not None and (packed or cache is not None):
            for i in cfg.stack:
                needs = ["carry"] if cache is not None and str(i) in cache.layers else []
                attention_kinds.require(cfg.layer(i).attention, "packed", *needs)
        positions, keys, offset = _places(tokens.shape, positions, segment_ids, cache, empty)
        mask = MaskSpec(cfg.family != "encoder", segment_ids, segment_ids, offset, lengths, packed)
        context = {"positions": positions, "mask": mask}
        source_segments = None
        if cfg.family == "encoder_decoder":
            context |= _looking_back(memory, cache, segment_ids, tokens.shape)
            source_segments = context["memory_mask"].key_segments
        x = constrain(self.embed(params, tokens, positions, token_types), ACTIVATION)
        x = dropout(x, cfg.dropout, None if rng is None else jax.random.fold_in(rng, cfg.total_layers))
        bias = self._biases(params, cfg.stack, positions, keys)
        x, layer_caches, aux = self._stack(params, cfg.stack, x, bias, rng, capture, cache=cache, **context)
        if cache is not None:
            if segment_ids is None:
                length = cache.length + (tokens.shape[1] if lengths is None else lengths)
            else:
                length = _length_of_last(positions, segment_ids, cache.length)
            aux["cache"] = Cache(length, layer_caches, source_segments, cache.slots)
        return self.final_norm(params, x), aux

    def apply(
        self, params: Params, tokens: Int[Array, "B T"], source: Int[Array, "B S"] | None = None, **options: Any
    ) -> tuple[Float[Array, "..."], dict]:
        """Returns (logits, aux): `head` after `features`, after `encode` if there is a `source`."""
        if source is not None:
            options["memory"], _ = self.encode(params, source)
        hidden, aux = self.features(params, tokens, **options)
        if self.cfg.head == "sequence":
            hidden = self.pool(hidden, options.get("segment_ids"))
        return self.head(params, hidden), aux

    def empty_cache(self, batch: int, slots: int, source_slots: int = 0) -> Cache:
        """Returns a cache for `slots` tokens a row; an encoder-decoder's source has exactly `source_slots`.

        Raises:
          UserError: it should be rounded, and no kind of attention here can do that.
        """
        layers, rounds = {}, self.compute.cache_dtype == "int8"
        kinds = {self.cfg.layer(i).attention for i in self.cfg.stack}
        if rounds and not any(attention_kinds.kind(name).rounds for name in kinds):
            raise UserError(f"config.compute.cache_dtype: {', '.join(sorted(kinds))} cannot keep what they do in int8")

        def dtype(name: str) -> Any:
            return jnp.int8 if rounds and attention_kinds.kind(name).rounds else self.compute.jnp_dtype

        for i in self.cfg.stack:
            layer = self.cfg.layer(i)
            own = attention_kinds.empty_cache(layer.attention, layer, batch, slots, dtype(layer.attention))
            source = (layer.across, batch, source_slots, dtype(layer.cross_attention))
            layers[str(i)] = (
                (own, attention_kinds.empty_cache(layer.cross_attention, *source, key="cross_attention"))
                if layer.cross
                else own
            )
        segments = jnp.ones((batch, source_slots), jnp.int32) if self.cfg.encoder_layers else None
        return Cache(jnp.zeros((batch,), jnp.int32), layers, segments, slots)

    def empty_carry(self, batch: int) -> Cache | None:
        """Returns the cache with which `batch` rows begin to go on from row to row; None if no layer can.

        Only layers whose kind carries something are in it; the others see each row alone.
        """
        layers = {}
        for i in self.cfg.stack:
            layer = self.cfg.layer(i)
            if attention_kinds.kind(layer.attention).carry and not layer.cross:
                dtype = self.compute.jnp_dtype
                layers[str(i)] = attention_kinds.empty_cache(layer.attention, layer, batch, 0, dtype)
        return Cache(jnp.zeros((batch,), jnp.int32), layers) if layers else None

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _tied(self) -> bool:
        return self.cfg.tied_embeddings and self.cfg.head in ("language_model", "masked_language_model")

    def _stack(self, params, layers, x, bias, rng, capture, cache=None, **context):
        captured: dict[str, list] = {"hidden": []} if "hidden" in capture else {}
        layer_caches = {}
        for i in layers:
            if "hidden" in capture:
                captured["hidden"].append(x)
            x, layer_cache, aux = self.block(
                params,
                i,
                x,
                bias=bias(self.cfg.layer(i).heads),
                cache=None if cache is None else cache.layers.get(str(i)),
                rng=None if rng is None else jax.random.fold_in(rng, i),
                capture=capture,
                **context,
            )
            x = constrain(x, ACTIVATION)
            if layer_cache is not None:
                layer_caches[str(i)] = layer_cache
            for name, value in aux.items():
                captured.setdefault(name, []).append(value)
        if "hidden" in capture:
            captured["hidden"].append(x)
        return x, layer_caches, captured

    def _biases(self, own: Params, layers: range, queries: Array, keys: Array):
        """Returns heads -> the bias that all layers of a stack with so many heads share."""

        @functools.lru_cache
        def bias(heads: int) -> Array | None:
            if self.cfg.positions == "alibi":
                return position_encodings.alibi_bias(queries, keys, heads)
            if self.cfg.positions == "relative":
                return self._relative(layers).apply({"params": own["relative_bias"]}, queries, keys)
            return None

        return bias

    def _relative(self, layers: range) -> RelativeBias:
        first = self.cfg.layer(layers[0])
        return RelativeBias(self.cfg, first.heads, first.causal)

    def _captures(self, capture: Iterable[str]) -> frozenset[str]:
        unknown = set(capture) - set(self.captures)
        if unknown:
            raise UserError(f"capture: unknown {sorted(unknown)}; one of: {', '.join(self.captures)}")
        return frozenset(capture)

    def _final_norm(self) -> Norm:
        return Norm(self.cfg.norm, self.cfg.width, self.cfg.norm_epsilon, self.cfg.bias, self.compute.jnp_dtype)

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.cfg, self.compute, transform=self.cfg.head == "masked_language_model")

    def _boxed(self, rng: Array) -> Params:
        """Parameters inside the boxes that carry their logical axes."""
        cfg = self.cfg
        keys = jax.random.split(rng, cfg.total_layers + 2)
        ids = jnp.zeros((1, 2), jnp.int32)
        x = jnp.zeros((1, 2, cfg.width), self.compute.jnp_residual_dtype)
        context = {"positions": ids, "mask": MaskSpec(), "memory": x, "memory_mask": MaskSpec(False)}
        params = {"embedding": Embedding(cfg, self.compute).init(keys[-1], ids, ids)["params"], "layers": {}}
        for i in range(cfg.total_layers):
            params["layers"][str(i)] = Block(cfg.layer(i), self.compute).init(keys[i], x, **context)["params"]
        params |= self._boxed_ends(keys[-1], cfg.stack, x)
        if cfg.encoder_layers:
            table = jnp.zeros((cfg.vocab_size, cfg.width))
            rng = jax.random.fold_in(keys[-1], 1)
            own = Embedding(cfg, self.compute).init(rng, ids, ids, None, table).get("params", {})
            params["encoder"] = ({"embedding": own} if own else {}) | self._boxed_ends(rng, cfg.encoder_stack, x)
        return params | self._boxed_heads(keys[-2], keys[-1], x)

    def _boxed_ends(self, rng: Array, layers: range, x: Array) -> Params:
        """What a stack has beside its embedding and its layers."""
        params = {}
        if self.cfg.norm_place == "pre":
            params["final_norm"] = self._final_norm().init(rng, x)["params"]
        if self.cfg.positions == "relative":
            ids = jnp.zeros((1, 2), jnp.int32)
            params["relative_bias"] = self._relative(layers).init(jax.random.fold_in(rng, 2), ids, ids)["params"]
        return params

    def _boxed_heads(self, rng: Array, pooler_rng: Array, x: Array) -> Params:
        cfg, params = self.cfg, {}
        if cfg.pooler:
            params["pooler"] = Pooler(cfg).init(jax.random.fold_in(pooler_rng, 3), x[:, 0])["params"]
        if cfg.head in ("sequence", "tokens"):
            params["head"] = Classes(cfg).init(rng, x)["params"]
        elif cfg.head != "none":
            table = jnp.zeros((cfg.vocab_size, cfg.width)) if self._tied else None
            head = self._vocabulary().init(rng, x, table).get("params", {})
            params |= {"head": head} if head else {}
        return params


def _check_room(cfg: ModelConfig, cache: Cache | None, tokens: int) -> None:
    """Refuses rows without a token, and more tokens than a cache by slot has room for, as far as that is known."""
    if not tokens:
        raise UserError("rows of 0 tokens; a model reads at least one")
    kinds = () if cache is None else (attention_kinds.kind(cfg.layer(i).attention) for i in cfg.stack)
    if all(kind.carry for kind in kinds):
        return
    known = not isinstance(cache.length, jax.core.Tracer) and cache.length.size > 0
    past = int(jnp.max(cache.length)) if known else 0
    if past + tokens > cache.slots:
        raise UserError(
            f"a cache of {cache.slots} slots cannot hold {past + tokens} tokens ({past} and {tokens} more); "
            "make it longer with empty_cache"
        )


def _places(
    shape: tuple[int, int], positions: Array | None, segment_ids: Array | None, cache: Cache | None, empty: bool
) -> tuple[Int[Array, "B T"], Int[Array, "B S"], Int[Array, "B"] | None]:
    """Returns positions of tokens and of keys, and the slot of the first token where keys come from a cache."""
    rows, tokens = shape
    start = jnp.zeros((rows,), jnp.int32) if cache is None or empty else cache.length
    if positions is None:
        positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    elif cache is not None and segment_ids is not None:  # a row's first document goes on
        positions = positions + jnp.where(segment_ids == segment_ids[:, :1], start[:, None], 0)
    if cache is None or empty or segment_ids is not None:
        return positions, positions, None
    return positions, jnp.broadcast_to(jnp.arange(cache.slots), (rows, cache.slots)), start


def _length_of_last(positions: Array, segment_ids: Array, start: Array) -> Int[Array, "B"]:
    """How many tokens each row's last document has so far; `start` for rows of padding alone."""
    last = jnp.max(segment_ids, axis=1)
    length = jnp.max(jnp.where(segment_ids == last[:, None], positions + 1, 0), axis=1)
    return jnp.where(last == 0, start, length)


def _looking_back(memory: Memory | None, cache: Cache | None, segment_ids: Array | None, shape: tuple) -> dict:
    """What a decoder's blocks see of the source: the encoded states, or only the cache if that has them."""
    if memory is None and cache is None:
        raise ValueError("an encoder-decoder needs `memory` (see `encode`), or a cache that has seen it")
    segments = cache.source_segments if memory is None else memory.segments
    # A target in one document may look at all of its source, whatever the source's numbering.
    query = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return {
        "memory": None if memory is None else memory.hidden,
        "memory_mask": MaskSpec(False, query, segments, packed=False),
    }


@functools.lru_cache(maxsize=32)
def abstract(cfg: ModelConfig) -> tuple[Params, dict[str, tuple[str | None, ...]]]:
    """Returns the parameters of `cfg` as shapes, and their logical axes by path ("layers/0/attention/q").

    The only source of restore targets, shardings and shape errors; computes nothing. A leaf class in the place of a
    matrix has axes for each of its parts ("layers/0/attention/q/a").
    """
    shapes, axes = _plain(cfg)
    return formats.applied(cfg.formats, shapes, axes, lambda form, w: jax.eval_shape(form.of, w))


@functools.lru_cache(maxsize=32)
def _plain(cfg: ModelConfig) -> tuple[Params, dict[str, tuple[str | None, ...]]]:
    """Shapes and axes of the arrays that leaves stand for."""
    boxed = jax.eval_shape(Model(cfg.plain())._boxed, jax.random.key(0))
    axes = {}
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    for path, leaf in jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)[0]:
        axes["/".join(key.key for key in path)] = leaf.names
    return nn.meta.unbox(boxed), axes
