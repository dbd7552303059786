"""The Transformer: embedding, unrolled blocks, final norm, head, and `Model`, which composes them.

Notable: Linen modules are used purely and one block at a time. Parameters are nested dicts,
`layers/3/attention/q`, and the stack is a Python loop over `Block.apply`, so layers may differ,
any block can be called alone, and rematerialisation wraps one pure function.
`features` and `head` are the seam between model and loss. Nothing is hidden: caches, random keys
and captures go in and come out.
Left out: scan over layers (24 unrolled layers compile in seconds, and layers may differ).

Dims: B batch, T time, D embed, V vocab.
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
from fastlm.models import positions as position_encodings
from fastlm.models.config import Compute, LayerConfig, ModelConfig
from fastlm.models.feed_forward import FeedForward
from fastlm.models.norms import Norm
from fastlm.models.weights import normal, weight
from fastlm.ops.attention import softcap
from fastlm.ops.caches import Cache, KVCache
from fastlm.ops.contract import PRODUCT, contract, lookup
from fastlm.ops.masks import MaskSpec
from fastlm.parallel.rules import constrain

CAPTURES = ("hidden", "attention", "qkv")
ACTIVATION = ("batch", "length", "hidden")

Params = dict[str, Any]


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zeroes a share `rate` of `x` and rescales the rest; without a key, returns `x`."""
    if rng is None or not rate:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Embedding(nn.Module):
    """Token table, with learned or sinusoidal positions added where the config says so."""

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens."""
        cfg, dtype = self.cfg, self.compute.jnp_residual_dtype
        table = weight(self, "table", (cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(cfg.init_scale))
        x = lookup(table, tokens, dtype, axes=("vocab", None))
        if cfg.positions == "learned":
            rows = weight(self, "positions", (cfg.max_length, cfg.width), ("position", "embed"), normal(cfg.init_scale))
            x = x + lookup(rows, positions, dtype, axes=(None, None))
        if cfg.positions == "sinusoidal":
            x = x + position_encodings.sinusoidal(positions, cfg.width).astype(dtype)
        return x


class Block(nn.Module):
    """Attention and feed-forward with residuals; norms before ("pre") or after ("post") them."""

    cfg: LayerConfig
    compute: Compute
    capture: frozenset[str] = frozenset()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, positions, mask, bias=None, cache=None, rng=None
    ) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Any]]:
        """Returns (x, cache, captured values)."""
        cfg = self.cfg
        keys = (None, None, None) if rng is None else jax.random.split(rng, 3)
        attend = attention_kinds.kind(cfg.attention).module(cfg, self.compute, self.capture, name="attention")
        pre, inner = cfg.norm_place == "pre", self.compute.jnp_dtype

        h = self._norm("attention_norm", x, inner) if pre else x.astype(inner)
        h, cache, aux = attend(h, h, positions=positions, mask=mask, bias=bias, cache=cache, rng=keys[0])
        x = x + dropout(h, cfg.dropout, keys[1]).astype(x.dtype)
        x = x if pre else self._norm("attention_norm", x, x.dtype)

        h = self._norm("feed_forward_norm", x, inner) if pre else x.astype(inner)
        h = FeedForward(cfg, name="feed_forward")(h)
        x = x + dropout(h, cfg.dropout, keys[2]).astype(x.dtype)
        return (x if pre else self._norm("feed_forward_norm", x, x.dtype)), cache, aux

    def _norm(self, name: str, x: Array, dtype: Any) -> Array:
        return Norm(self.cfg.norm, self.cfg.width, self.cfg.norm_epsilon, self.cfg.bias, dtype, name=name)(x)


class Head(nn.Module):
    """Untied projection to the vocabulary."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Projects."""
        shape = (self.cfg.width, self.cfg.vocab_size)
        kernel = weight(self, "kernel", shape, ("embed", "vocab"), normal(self.cfg.init_scale))
        return contract(hidden, kernel, dtype=jnp.float32)


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

    def __post_init__(self) -> None:
        if self.cfg.vocab_size < 1:
            raise UserError("config.model.vocab_size: 0 is filled in from the tokenizer; without one, give it")
        for i in range(self.cfg.layers):
            attention_kinds.require(self.cfg.layer(i).attention, "causal")

    # --- parts -----------------------------------------------------------------------------------

    def init(self, rng: Array) -> Params:
        """Returns fresh parameters (float32 arrays in nested dicts)."""
        return nn.meta.unbox(self._boxed(rng))

    def embed(self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens."""
        return Embedding(self.cfg, self.compute).apply({"params": params["embedding"]}, tokens, positions)

    def block(self, params: Params, i: int, x: Float[Array, "B T D"], **context: Any) -> tuple[Array, Any, dict]:
        """Runs block `i` alone; see `Block` for `context` (positions, mask, bias, cache, rng, capture)."""
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
        return (
            {"embedding": {"table": params["embedding"]["table"]}}
            if self.cfg.tied_embeddings
            else {"head": params["head"]}
        )

    def head(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns logits in float32."""
        if self.cfg.tied_embeddings:
            logits = contract(hidden, params["embedding"]["table"], transpose=True, dtype=jnp.float32)
        else:
            logits = Head(self.cfg).apply({"params": params["head"]}, hidden)
        return softcap(logits, self.cfg.logit_softcap)

    # --- wholes ----------------------------------------------------------------------------------

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        rng: Array | None = None,
        capture: Iterable[str] = (),
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Runs everything below the head.

        Args:
          positions: place of each token in its document; by default 0, 1, ... (after the cache).
          segment_ids: document number of each token within its row, 0 for padding; None is one document.
          cache: what `empty_cache` made; the tokens continue it.
          rng: key for dropout; None runs deterministically.
          capture: which of `CAPTURES` to return in `aux`, one entry per layer.

        Returns:
          (hidden, aux); `aux["cache"]` is the advanced cache if one was given.

        Raises:
          UserError: a capture that does not exist, or packed rows for a kind that cannot keep them apart.
          ValueError: both segments and a cache.
        """
        capture = self._captures(capture)
        if segment_ids is not None:
            if cache is not None:
                raise ValueError("packed documents cannot be decoded: give segment_ids or a cache, not both")
            for i in range(self.cfg.layers):
                attention_kinds.require(self.cfg.layer(i).attention, "packed")
        batch, length = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        if positions is None:
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
        mask = MaskSpec(True, segment_ids, segment_ids, None if cache is None else start)
        x = constrain(self.embed(params, tokens, positions), ACTIVATION)
        x = dropout(x, self.cfg.dropout, None if rng is None else jax.random.fold_in(rng, self.cfg.layers))
        x, layer_caches, aux = self._stack(params, x, positions, mask, cache, rng, capture)
        if cache is not None:
            aux["cache"] = Cache(cache.length + length, layer_caches, cache.slots)
        return self.final_norm(params, x), aux

    def apply(self, params: Params, tokens: Int[Array, "B T"], **options: Any) -> tuple[Float[Array, "B T V"], dict]:
        """Returns (logits, aux): `head` after `features`."""
        hidden, aux = self.features(params, tokens, **options)
        return self.head(params, hidden), aux

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns a cache for `slots` tokens a row."""
        layers = {}
        for i in range(self.cfg.layers):
            layer = self.cfg.layer(i)
            module = attention_kinds.require(layer.attention, "decode").module
            layers[str(i)] = module.empty_cache(layer, batch, slots, self.compute.jnp_dtype)
        return Cache(jnp.zeros((batch,), jnp.int32), layers, slots)

    # --- inside ----------------------------------------------------------------------------------

    def _stack(self, params, x, positions, mask, cache, rng, capture):
        slots = x.shape[1] if cache is None else cache.slots
        bias = functools.lru_cache(lambda heads: self._bias(positions, slots, cache, heads))
        captured: dict[str, list] = {name: [] for name in capture}
        layer_caches = {}
        for i in range(self.cfg.layers):
            if "hidden" in capture:
                captured["hidden"].append(x)
            x, layer_caches[str(i)], aux = self.block(
                params,
                i,
                x,
                positions=positions,
                mask=mask,
                bias=bias(self.cfg.layer(i).heads),
                cache=None if cache is None else cache.layers[str(i)],
                rng=None if rng is None else jax.random.fold_in(rng, i),
                capture=capture,
            )
            x = constrain(x, ACTIVATION)
            for name, value in aux.items():
                captured[name].append(value)
        if "hidden" in capture:
            captured["hidden"].append(x)
        return x, layer_caches, captured

    def _bias(self, positions: Array, slots: int, cache: Cache | None, heads: int) -> Array | None:
        """The bias that all layers with so many heads share."""
        if self.cfg.positions != "alibi":
            return None
        keys = positions if cache is None else jnp.broadcast_to(jnp.arange(slots), (positions.shape[0], slots))
        return position_encodings.alibi_bias(positions, keys, heads)

    def _captures(self, capture: Iterable[str]) -> frozenset[str]:
        unknown = set(capture) - set(CAPTURES)
        if unknown:
            raise UserError(f"capture: unknown {sorted(unknown)}; one of: {', '.join(CAPTURES)}")
        return frozenset(capture)

    def _final_norm(self) -> Norm:
        return Norm(self.cfg.norm, self.cfg.width, self.cfg.norm_epsilon, self.cfg.bias, self.compute.jnp_dtype)

    def _boxed(self, rng: Array) -> Params:
        """Parameters inside the boxes that carry their logical axes."""
        cfg, keys = self.cfg, jax.random.split(rng, self.cfg.layers + 2)
        ids = jnp.zeros((1, 2), jnp.int32)
        x = jnp.zeros((1, 2, cfg.width), self.compute.jnp_residual_dtype)
        context = {"positions": ids, "mask": MaskSpec()}
        params = {"embedding": Embedding(cfg, self.compute).init(keys[-1], ids, ids)["params"], "layers": {}}
        for i in range(cfg.layers):
            params["layers"][str(i)] = Block(cfg.layer(i), self.compute).init(keys[i], x, **context)["params"]
        if cfg.norm_place == "pre":
            params["final_norm"] = self._final_norm().init(keys[-1], x)["params"]
        if not cfg.tied_embeddings:
            params["head"] = Head(cfg).init(keys[-2], x)["params"]
        return params


@functools.lru_cache(maxsize=32)
def abstract(cfg: ModelConfig) -> tuple[Params, dict[str, tuple[str | None, ...]]]:
    """Returns the parameters of `cfg` as shapes, and their logical axes by path ("layers/0/attention/q").

    The only source of restore targets, shardings and shape errors; computes nothing.
    """
    boxed = jax.eval_shape(Model(cfg)._boxed, jax.random.key(0))
    axes = {}
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    for path, leaf in jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)[0]:
        axes["/".join(key.key for key in path)] = leaf.names
    return nn.meta.unbox(boxed), axes
