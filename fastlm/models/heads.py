"""What stands on the last hidden states: vocabulary logits, classes of a text, classes of each token.

Notable: every head is a function of hidden vectors [..., D] alone, so losses and exports can call it
on chunks; what a text is read from (`pool`) comes before it. A tied vocabulary is passed in.
Papers: BERT's transform and pooler, arXiv 1810.04805.

Dims: B batch, T time, D embed, V vocab, C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models.config import Compute, ModelConfig
from fastlm.models.norms import Norm
from fastlm.models.weights import normal, weight
from fastlm.ops import activations
from fastlm.ops.attention import softcap
from fastlm.ops.contract import add_bias, contract

POOLER_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Vocabulary(nn.Module):
    """Logits over the vocabulary, in float32; before them BERT's transform if `transform`."""

    cfg: ModelConfig
    compute: Compute
    transform: bool

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"], table: Float[Array, "V D"] | None) -> Float[Array, "... V"]:
        """Projects by the tied `table` or by a kernel of its own."""
        cfg = self.cfg
        if self.transform:
            hidden = _layer(self, "transform", hidden, cfg.width, cfg.init_scale)
            hidden = activations.gelu_exact(hidden)
            dtype = self.compute.jnp_dtype
            hidden = Norm(cfg.norm, cfg.width, cfg.norm_epsilon, cfg.bias, dtype, name="norm")(hidden)
        if cfg.head_scale != 1:
            hidden = hidden * jnp.asarray(cfg.head_scale, hidden.dtype)
        if table is None:
            kernel = weight(self, "kernel", (cfg.width, cfg.vocab_size), ("embed", "vocab"), normal(cfg.init_scale))
            logits = contract(hidden, kernel, dtype=jnp.float32)
        else:
            logits = contract(hidden, table, transpose=True, dtype=jnp.float32)
        if cfg.head_bias:
            logits = add_bias(logits, weight(self, "bias", (cfg.vocab_size,), ("vocab",)))
        return softcap(logits, cfg.logit_softcap)


class Classes(nn.Module):
    """`cfg.classes` numbers for each vector, in float32."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Projects."""
        cfg = self.cfg
        kernel = weight(self, "kernel", (cfg.width, cfg.classes), ("embed", "classes"), normal(cfg.init_scale))
        return add_bias(contract(hidden, kernel, dtype=jnp.float32), weight(self, "bias", (cfg.classes,), ("classes",)))


class Pooler(nn.Module):
    """A layer on the vector that stands for a text: BERT's pooler, RoBERTa's and DistilBERT's first head layer."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Projects and activates."""
        cfg = self.cfg
        return POOLER_ACTIVATIONS[cfg.pooler](_layer(self, "", pooled, cfg.width, cfg.init_scale))


def pool(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, pooling: str) -> Float[Array, "B D"]:
    """Returns one vector per text; `segment_ids` is 0 where a row is padded (on the right)."""
    if pooling == "first":
        return hidden[:, 0]
    real = jnp.ones(hidden.shape[:2], bool) if segment_ids is None else segment_ids > 0
    count = jnp.maximum(jnp.sum(real, axis=1), 1)
    if pooling == "last":
        return jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where(real[..., None], hidden.astype(jnp.float32), 0), axis=1)
    return (total / count[:, None]).astype(hidden.dtype)


def _layer(module: nn.Module, name: str, x: Array, size: int, scale: float) -> Array:
    kernel_name, bias_name = (name, f"{name}_bias") if name else ("kernel", "bias")
    # "hidden" is not cut over devices: XLA's partitioner (jax 0.9 to 0.12) gives wrong gradients where a product cut
    # there by one mesh axis is followed by a matrix cut along the same axis by another, which is what the heads are.
    kernel = weight(module, kernel_name, (x.shape[-1], size), ("embed", "hidden"), normal(scale))
    return add_bias(contract(x, kernel), weight(module, bias_name, (size,), ("norm",)))
