"""Model FLOPs: the arithmetic a model asks for, whatever its implementation does beside it.

Convention (PaLM, arXiv 2204.02311, appendix B): a multiply-add is two operations; only products
with weights and with other tokens count. Weights: 2 per matrix entry per token; looking a token up
in the embedding is no product, the output head is one, tied or not. Attention: scores and values,
4 * S * heads * head_dim per token and layer forward, S the tokens that its kind looks at on average (`Attention.seen`):
half of the row when causal (PaLM itself does not halve), the window, the width of a state. Training is three times
the forward pass, and what rematerialisation computes again does not count.
Left out: norms, softmax, activations, rotary; padding and packed documents, which would lower the
attention term.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastlm.models import attention as attention_kinds
from fastlm.models.config import Compute, LayerConfig, ModelConfig
from fastlm.ops.masks import MaskSpec

TRAINING_PER_FORWARD = 3


def forward_flops(cfg: ModelConfig, rows: int, length: int, source_length: int = 0) -> float:
    """Returns the FLOPs of a forward pass with plain (uncompressed) weights.

    Args:
      rows, length: B and T of what the only, or the decoder's, stack reads.
      source_length: S of what an encoder-decoder's encoder reads.
    """
    tokens, source = rows * length, rows * source_length
    total = 0.0
    for i in cfg.encoder_stack:
        layer = cfg.layer(i)
        total += 2 * source * layer_entries(layer) + attention_flops(layer, source, keys_seen(layer, source_length))
    for i in cfg.stack:
        layer = cfg.layer(i)
        total += 2 * tokens * layer_entries(layer) + attention_flops(layer, tokens, keys_seen(layer, length))
        if layer.cross:
            keys = 2 * layer.width * layer.kv_heads * layer.head_dim
            cross = attention_entries(layer.across, "cross_attention")
            total += 2 * tokens * (cross - keys) + 2 * source * keys
            total += attention_flops(layer, tokens, keys_seen(layer.across, source_length, "cross_attention"))
    return total + 2 * (rows if cfg.head == "sequence" else tokens) * head_entries(cfg)


def attention_flops(layer: LayerConfig, queries: float, seen: float) -> float:
    """Returns the FLOPs of scores and values for so many queries that see so many keys each."""
    return 4 * queries * seen * layer.heads * layer.head_dim


def keys_seen(layer: LayerConfig, length: int, key: str = "attention") -> float:
    """Returns how many of `length` keys a token is compared with on average, in this layer's kind of attention."""
    spec = getattr(layer, key)
    return attention_kinds.kind(spec, key).module.seen(layer, attention_kinds.options(spec, key), length)


@functools.lru_cache(maxsize=256)
def attention_entries(layer: LayerConfig, key: str = "attention") -> int:
    """Returns the matrix entries of one attention sublayer that tokens are multiplied with."""
    module = attention_kinds.make(getattr(layer, key), layer, Compute(), key=key)
    x, ids = jax.ShapeDtypeStruct((1, 2, layer.width), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = lambda x, ids: module.init(jax.random.key(0), x, x, positions=ids, mask=MaskSpec(layer.causal))
    boxes = jax.tree.leaves(
        jax.eval_shape(init, x, ids), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    matrices = (box for box in boxes if len(box.names) == 2 and "position" not in box.names)
    return sum(math.prod(box.value.shape) for box in matrices)


def layer_entries(layer: LayerConfig) -> int:
    """Returns the matrix entries of self-attention and feed-forward of one layer."""
    matrices = 3 if layer.feed_forward.endswith("glu") else 2
    return attention_entries(layer) + matrices * layer.width * layer.feed_forward_width


def head_entries(cfg: ModelConfig) -> int:
    """Returns the matrix entries of the head."""
    square = cfg.width * cfg.width
    return {
        "language_model": cfg.width * cfg.vocab_size,
        "masked_language_model": square + cfg.width * cfg.vocab_size,
        "sequence": (square if cfg.pooler else 0) + cfg.width * cfg.classes,
        "tokens": cfg.width * cfg.classes,
        "none": 0,
    }[cfg.head]
