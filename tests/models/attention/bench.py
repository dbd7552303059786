"""One attention layer of any kind on small inputs, beside its oracle: what the tests of the contract run.

A case is a kind with options and its oracle. The oracle says from the definition, token pair by token pair, what each
head gives; the layer's own projections are taken as they are (captured), or made again from the parameters by oracles
of kinds that have others.

Dims: B batch, T time, S key time, N heads, K kv heads, H head dim, D embed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.models import Compute, ModelConfig
from fastlm.models import attention as kinds
from fastlm.models.config import LayerConfig
from fastlm.ops import softmax
from fastlm.ops.masks import MaskSpec

BATCH, WIDTH, HEADS, HEAD_DIM = 2, 16, 2, 8
PACKED = np.array([[1] * 4 + [2] * 6 + [3] * 3 + [0] * 2, [1] * 9 + [2] * 6], np.int32)
PADDED = np.array([[1] * 15, [1] * 8 + [0] * 7], np.int32)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What an oracle is given.

    Attributes:
      params, cfg, options: of the layer.
      x, context: [B, T, D], [B, S, D].
      q, k, v: [B, T, N, H], [B, S, N, H] twice, as captured, keys once per query head; None of kinds without.
      see: [B, T, S], what causality, documents and padding let a token see.
      positions: [B, T], of tokens in their documents.
      softmax: of the layer.
    """

    params: dict[str, Any]
    cfg: LayerConfig
    options: Any
    x: Array
    context: Array
    q: Array | None
    k: Array | None
    v: Array | None
    see: Array
    positions: Array
    softmax: softmax.Softmax

    @property
    def distance(self) -> np.ndarray:
        """Slots from a key forward to a query, [T, S]."""
        return np.arange(self.see.shape[1])[:, None] - np.arange(self.see.shape[2])

    def scores(self) -> Array:
        """q . k scaled, [B, N, T, S]."""
        return jnp.einsum("BTNH,BSNH->BNTS", self.q, self.k) * self.cfg.attention_scale

    def attend(self, see: Array) -> Array:
        """Softmax attention of every token to those that `see` [B, T, S] names, [B, T, N, H]."""
        p = self.softmax(jnp.where(see[:, None], self.scores(), -1e30))
        return jnp.einsum("BNTS,BSNH->BTNH", p, self.v)


def as_they_are(params: dict[str, Any], cfg: LayerConfig, x: Array, y: Array) -> Array:
    """The `finish` of kinds whose heads go straight into the out projection."""
    del params, cfg, x
    return y


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind with small options, and what it should give: `oracle(pairs) -> [B, T, N, H]`.

    Attributes:
      finish: (params, cfg, x, heads [B, T, N, H]) to what goes into the out projection, by definition: norms, gates.
      layer: changes to the layer's config.
      tolerance: largest difference from the oracle, against values of about 1.
    """

    spec: str
    oracle: Callable[[Pairs], Array]
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    finish: Callable[[dict[str, Any], LayerConfig, Array, Array], Array] = as_they_are
    tolerance: float = 2e-5

    @property
    def kind(self) -> kinds.Kind:
        """Its entry of the table."""
        return kinds.kind(self.spec)


def layer(case: Case, causal: bool, **changes: Any) -> LayerConfig:
    """Returns the layer of a small model: grouped queries, rotary positions, norms of q and k, unless changed."""
    values = {
        "heads": HEADS,
        "kv_heads": 1,
        "qk_norm": True,
        "max_length": 32,
        "init_scale": 0.3,
        "residual_init": "same",
    }
    values |= case.layer | changes
    family = "decoder" if causal else "encoder"
    head = "language_model" if causal else "none"
    return ModelConfig(
        family=family, head=head, vocab_size=11, layers=1, width=WIDTH, attention=case.spec, **values
    ).layer(0)


def module(case: Case, cfg: LayerConfig, capture: tuple[str, ...] = (), dtype: str = "float32") -> kinds.Attention:
    """Returns the module of a case."""
    return kinds.make(case.spec, cfg, Compute(dtype=dtype), frozenset(capture))


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Returns the place of each token in its document, [B, T]."""
    places = np.zeros_like(segments)
    for t in range(1, segments.shape[1]):
        places[:, t] = np.where(segments[:, t] == segments[:, t - 1], places[:, t - 1] + 1, 0)
    return places


def inputs(length: int, seed: int = 0, batch: int = BATCH) -> Array:
    """Returns random x [B, T, D]."""
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))


@functools.lru_cache
def _params(case: "Key", causal: bool) -> dict[str, Any]:
    cfg = layer(case.case, causal)
    x = jnp.zeros((1, 2, WIDTH))
    run = lambda key: module(case.case, cfg).init(key, x, x, positions=jnp.zeros((1, 2), int), mask=MaskSpec(causal))
    boxed = jax.jit(run)(jax.random.key(3))["params"]
    params = jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: hasattr(b, "value"))
    # Whatever starts at 0 or 1 (biases, gates, norms) should matter too.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys)])


class Key:
    """A case as a key, by its spec."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __hash__(self) -> int:
        return hash((self.case.spec, tuple(sorted(self.case.layer.items()))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hash(self) == hash(other)


def params_of(case: Case, causal: bool = True) -> dict[str, Any]:
    """Returns random parameters of the layer."""
    return _params(Key(case), causal)


def mask_of(causal: bool, segments: np.ndarray | None, **more: Any) -> MaskSpec:
    """Returns the mask of rows with these documents."""
    segments = None if segments is None else jnp.asarray(segments)
    return MaskSpec(causal, segments, segments, **more)


def expected(
    case: Case, cfg: LayerConfig, params: dict, x: Array, context: Array, mask: MaskSpec, positions: Array
) -> Array:
    """Returns what the layer should give, [B, T, D], by its oracle; differentiable in params and x."""
    look = {"positions": positions, "mask": mask}
    _, _, aux = module(case, cfg, ("qkv",)).apply({"params": params}, x, context, **look)
    q, k, v = aux.get("qkv", (None, None, None))
    if k is not None:
        k, v = (jnp.repeat(t, cfg.heads // t.shape[2], axis=2) for t in (k, v))
    dense = mask.dense(x.shape[1], context.shape[1])
    see = jnp.ones((1, x.shape[1], context.shape[1]), bool) if dense is None else dense[:, 0]
    see = jnp.broadcast_to(see, (x.shape[0], *see.shape[1:]))
    options = kinds.options(case.spec)
    pairs = Pairs(params, cfg, options, x, context, q, k, v, see, positions, softmax.make(cfg.softmax))
    return output(case, cfg, params, x, case.oracle(pairs))


def output(case: Case, cfg: LayerConfig, params: dict, x: Array, heads: Array) -> Array:
    """Returns what the layer should make of what its heads [B, T, N, H] give, [B, T, D]."""
    y = case.finish(params, cfg, x, heads)
    return y.reshape(*y.shape[:2], -1) @ params["out"]
