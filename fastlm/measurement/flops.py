"""Model FLOPs: the arithmetic a model asks for, whatever its implementation does beside it.

Convention (PaLM, arXiv 2204.02311, appendix B): a multiply-add is two operations; only products
with weights and with other tokens count. Weights: 2 per matrix entry per token; looking a token up
in the embedding is no product, the output head is one, tied or not. Attention: scores and values,
4 * T * heads * head_dim per token and layer forward; halved when causal, since a token sees half of
the others on average (PaLM itself does not halve). Training is three times the forward pass, and
what rematerialisation computes again does not count.
Left out: norms, softmax, activations, rotary; packed documents, whose shorter rows would lower the
attention term.
"""

from collections.abc import Sequence
from typing import Protocol

TRAINING_PER_FORWARD = 3

class Layer(Protocol):
    """What is read of one layer of an architecture."""

    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: str
    feed_forward_width: int


class Architecture(Protocol):
    """What is read of an architecture; `models.config.ModelConfig` has it."""

    vocab_size: int
    width: int
    layers: int

    def layer(self, i: int) -> Layer:
        """Returns layer `i`."""


def forward_flops_per_token(
    matrix_parameters: int, attention: Sequence[tuple[int, int]], length: int, causal: bool = True
) -> float:
    """Returns the FLOPs of a forward pass for each token of a row of `length` tokens.

    Args:
      matrix_parameters: entries of all matrices that a token is multiplied with, the head included.
      attention: (query heads, head dimension) of each layer that attends over all tokens.
    """
    seen = length / 2 if causal else length
    return 2 * matrix_parameters + sum(4 * seen * heads * head_dim for heads, head_dim in attention)


def matrix_parameters(cfg: Architecture) -> int:
    """Returns the entries of the matrices a token is multiplied with, for plain (uncompressed) weights."""
    total = cfg.width * cfg.vocab_size
    for i in range(cfg.layers):
        layer = cfg.layer(i)
        heads = 2 * layer.heads + 2 * layer.kv_heads
        total += cfg.width * heads * layer.head_dim
        gated = layer.feed_forward.endswith("glu")
        total += (3 if gated else 2) * cfg.width * layer.feed_forward_width
    return total


def model_flops_per_token(cfg: Architecture, length: int, causal: bool = True) -> float:
    """Returns the forward FLOPs for each token of a decoder with full attention and plain weights."""
    layers = [cfg.layer(i) for i in range(cfg.layers)]
    return forward_flops_per_token(matrix_parameters(cfg), [(x.heads, x.head_dim) for x in layers], length, causal)
