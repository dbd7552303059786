"""Several continuations of one prompt in one row of a cache, each seeing only its own past.

Notable: the beams of an input are the tokens of one row. Step n writes their keys and values side by side
into slots P + n K ... P + n K + K - 1 behind the prompt, and nothing is ever moved: when a search drops one
beam and splits another, only an index of ancestors changes, from which each step makes the mask. So a
prompt is stored once for all beams, and an encoder-decoder's source too. The alternative, a row per beam and
a gather of the whole cache at each step, was measured beside it (6 + 6 layers x 512, 16 inputs x 4 beams, 64
tokens, one core): 91 ms a step against 50; each beam then also looks at the masked keys of the others, which as one
product with four queries costs less than moving them.
Needs an attention kind whose cache is keys and values by slot ("full"). Layers are called one by one, because
keys stand at positions that are not their slots.

Dims: B batch, K beams, P prompt slots, T steps, S all slots (P + T K), G kv heads, H head dim, D embed.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as attention_kinds
from fastlm.models.attention.full import FullAttention
from fastlm.models.embedding import RelativeBias
from fastlm.models.positions import alibi_bias
from fastlm.models.transformer import ACTIVATION
from fastlm.ops.caches import Cache, KVCache
from fastlm.ops.key_major_attention import MASKED
from fastlm.ops.masks import MaskSpec
from fastlm.parallel.rules import constrain


@flax.struct.dataclass
class TreeCache(KVCache):
    """A `KVCache` of which all rows are written alike, and that grows."""

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[2]

    def write(self, k: Array, v: Array, offset: Int[Array, "B"]) -> "TreeCache":
        """Returns the cache with `k`, `v` [B, K, G, H] written from slot `offset`, the same in all rows."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, jnp.swapaxes(new, 1, 2).astype(old.dtype), offset[0], axis=2
        )
        return TreeCache(put(self.keys, k), put(self.values, v))

    def grow(self, slots: int) -> "TreeCache":
        """Returns the cache with room for `slots` more."""
        return jax.tree.map(lambda x: _pad(x, 2, slots), self)


@flax.struct.dataclass
class Tree:
    """What beams have seen.

    Attributes:
      layers: each layer's cache by number; with cross-attention a pair, the source's second.
      lengths: of the prompts, which fill slots 0 ... P - 1 (less what pads them).
      ancestors: which beam of step t is an ancestor of beam k (or k itself); -1 for steps to come.
      source_segments: of an encoder-decoder's source, 0 where it is padded.
    """

    layers: dict[str, Any]
    lengths: Int[Array, "B"]
    ancestors: Int[Array, "B K T"]
    source_segments: Int[Array, "B s"] | None

    @property
    def steps(self) -> int:
        """Room, in steps."""
        return self.ancestors.shape[2]


def check(cfg: ModelConfig) -> None:
    """Raises a `UserError` if a layer of the decoder has a cache of another kind."""
    for i in cfg.stack:
        layer = cfg.layer(i)
        for key in ("attention", "cross_attention") if layer.cross else ("attention",):
            name = getattr(layer, key)
            if attention_kinds.kind(name).module is not FullAttention:
                raise UserError(
                    f"config.model.{key}: beam search needs kind 'full', but layer {i} has '{name}'; use sampling, or "
                    "train with that kind"
                )


def plant(cache: Cache, beams: int, steps: int) -> Tree:
    """Returns the tree that grows from prompts in a cache of as many slots as the longest prompt has."""
    ancestors = jnp.full((cache.length.shape[0], beams, 0), -1, jnp.int32)
    is_cache = lambda x: isinstance(x, KVCache)
    layers = jax.tree.map(lambda x: TreeCache(x.keys, x.values), cache.layers, is_leaf=is_cache)
    return grow(Tree(layers, cache.length, ancestors, cache.source_segments), steps)


def grow(tree: Tree, steps: int) -> Tree:
    """Returns the tree with room for `steps` steps in all."""
    more, beams = steps - tree.steps, tree.ancestors.shape[1]
    ancestors = _pad(tree.ancestors, 2, more, -1)
    larger = lambda layer: (
        (layer[0].grow(more * beams), layer[1]) if isinstance(layer, tuple) else layer.grow(more * beams)
    )
    return tree.replace(layers={i: larger(layer) for i, layer in tree.layers.items()}, ancestors=ancestors)


def follow(tree: Tree, parents: Int[Array, "B K"]) -> Tree:
    """Returns the tree whose beam k continues what was beam `parents[k]`."""
    return tree.replace(ancestors=jnp.take_along_axis(tree.ancestors, parents[..., None], axis=1))


def advance(
    model: Model, params: Any, tree: Tree, tokens: Int[Array, "B K"], step: Int[Array, ""]
) -> tuple[Float[Array, "B K D"], Tree]:
    """Runs one token per beam, the `step`-th behind the prompt; returns hidden states and the tree with them in it."""
    cfg, (rows, beams) = model.cfg, tokens.shape
    # A handful of queries: no fused kernel fits, and the plain form reads this cache in place.
    model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, attention_form="plain"))
    me = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[:, None], (rows, beams, 1))
    tree = tree.replace(ancestors=jax.lax.dynamic_update_slice_in_dim(tree.ancestors, me, step, axis=2))
    positions = jnp.broadcast_to((tree.lengths + step)[:, None], tokens.shape)
    prompt_slots = _slots(tree) - tree.steps * beams
    hide = jnp.where(_visible(tree, prompt_slots), 0.0, MASKED)[:, None]
    context = {
        "positions": positions,
        "mask": MaskSpec(False, offset=jnp.full((rows,), prompt_slots + step * beams)),
        "memory_mask": MaskSpec(False, jnp.ones_like(tokens), tree.source_segments),
    }
    x, layers = constrain(model.embed(params, tokens, positions), ACTIVATION), {}
    for i in cfg.stack:
        bias = hide + _distance_bias(model, params, cfg.layer(i).heads, tree, positions, prompt_slots)
        x, layers[str(i)], _ = model.block(params, i, x, bias=bias, cache=tree.layers[str(i)], **context)
        x = constrain(x, ACTIVATION)
    return model.final_norm(params, x), tree.replace(layers=layers)


def _pad(x: Array, axis: int, more: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _slots(tree: Tree) -> int:
    layer = next(iter(tree.layers.values()))
    return (layer[0] if isinstance(layer, tuple) else layer).slots


def _visible(tree: Tree, prompt_slots: int) -> Array:
    """Which slots each beam sees, [B, K, S]: its prompt, its ancestors, itself."""
    rows, beams, steps = tree.ancestors.shape
    prompt = jnp.arange(prompt_slots) < tree.lengths[:, None, None]
    own = (tree.ancestors[..., None] == jnp.arange(beams)).reshape(rows, beams, steps * beams)
    return jnp.concatenate([jnp.broadcast_to(prompt, (rows, beams, prompt_slots)), own], axis=-1)


def _distance_bias(
    model: Model, params: Any, heads: int, tree: Tree, positions: Array, prompt_slots: int
) -> Float[Array, "B N 1 S"] | float:
    """What depends on how far back a key stands, the same for all beams since all are at the same position."""
    if model.cfg.positions not in ("alibi", "relative"):
        return 0.0
    rows, beams, steps = tree.ancestors.shape
    prompt = jnp.broadcast_to(jnp.arange(prompt_slots, dtype=jnp.int32), (rows, prompt_slots))
    written = tree.lengths[:, None] + jnp.repeat(jnp.arange(steps, dtype=jnp.int32), beams)
    keys = jnp.concatenate([prompt, written], axis=1)
    if model.cfg.positions == "alibi":
        return alibi_bias(positions[:, :1], keys, heads)
    module = RelativeBias(model.cfg, heads, causal=True)
    return module.apply({"params": params["relative_bias"]}, positions[:, :1], keys)
