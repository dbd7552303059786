"""Model FLOPs: the arithmetic a model asks for, whatever its implementation does beside it.

Convention (PaLM, arXiv 2204.02311, appendix B): a multiply-add is two operations; only products
with weights and with other tokens count. Weights: 2 per matrix entry per token; looking a token up
in the embedding is no product, the output head is one, tied or not. Attention: scores and values,
4 * S * heads * head_dim per token and layer forward, S the tokens looked at; halved when causal,
since a token sees half of the others on average (PaLM itself does not halve). Training is three times
the forward pass, and what rematerialisation computes again does not count.
Left out: norms, softmax, activations, rotary; padding and packed documents, which would lower the
attention term.
"""

from fastlm.models.config import LayerConfig, ModelConfig

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
        total += 2 * source * layer_entries(cfg.layer(i)) + attention_flops(cfg.layer(i), source, source_length)
    for i in cfg.stack:
        layer = cfg.layer(i)
        seen = length / 2 if layer.causal else length
        total += 2 * tokens * layer_entries(layer) + attention_flops(layer, tokens, seen)
        if layer.cross:
            keys = 2 * layer.width * layer.kv_heads * layer.head_dim
            total += 2 * tokens * (attention_entries(layer) - keys) + 2 * source * keys
            total += attention_flops(layer, tokens, source_length)
    return total + 2 * (rows if cfg.head == "sequence" else tokens) * head_entries(cfg)


def attention_flops(layer: LayerConfig, queries: float, seen: float) -> float:
    """Returns the FLOPs of scores and values for so many queries that see so many keys each."""
    return 4 * queries * seen * layer.heads * layer.head_dim


def attention_entries(layer: LayerConfig) -> int:
    """Returns the matrix entries of one attention sublayer."""
    return layer.width * (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim


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
