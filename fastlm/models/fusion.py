"""Products that read the same input as one product: an exact rewrite of a model's weights, for decoding.

q, k and v of self-attention become `qkv`, gate and up of a gated feed-forward layer `gate_up`, columns beside columns.
Notable: a step of decoding is bound by how fast weights are read, and XLA:CPU gives a product of few rows more than
one core only from about half a million weights on, which q, k and v of a small model reach together and not alone.
Left out: kinds of attention whose keys are made of something else than their queries, whose weights stay as they
are; tensor-parallel meshes, on which the parts of a fused weight would lie on other devices than they do alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fastlm.models.config import ModelConfig
from fastlm.models.transformer import abstract
from fastlm.ops.leaf import Leaf
from fastlm.ops.leaves import Columns

Params = Mapping[str, Any]
TOGETHER = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}


def fuse(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Returns a model that computes the same, with its products fused where that is possible.

    Args:
      params: all of them, or a part: some of what stands at the top of the tree, and of its layers.
    """
    if cfg.fused:
        return cfg, params
    cfg = dataclasses.replace(cfg.plain(), fused=True)  # leaves stay what they are, and stand elsewhere
    wanted = {name: inner for name, inner in abstract(cfg)[0].items() if name in params}
    if "layers" in params:
        wanted["layers"] = {number: wanted["layers"][number] for number in params["layers"]}
    return cfg, _rebuilt(params, wanted)


def _rebuilt(own: Params, wanted: Params) -> Params:
    """Returns the weights that are there as they are, and the others made of theirs."""
    made = {}
    for name, inner in wanted.items():
        if isinstance(inner, Mapping):
            made[name] = _rebuilt(own[name], inner)
        elif name in own:
            made[name] = own[name]
        else:
            made[name] = _together([own[part] for part in TOGETHER[name]])
    return made


def _together(parts: Sequence[Any]) -> Any:
    if any(isinstance(part, Leaf) for part in parts):
        return Columns(tuple(parts))
    return jnp.concatenate(parts, axis=-1)
