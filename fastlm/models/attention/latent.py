"""Multi-head latent attention (MLA): keys and values of all heads are made from one short vector per token.

    c = norm(x W_c) [R];   k = c W_k,  v = c W_v;   score = s (q . k + q_rotary . k_rotary)

A rotated key could not be made from c without knowing the query's position, so what is rotated stands beside it: P
channels of its own, one key for all heads, a query per head.
Cost: parallel time O(T S), memory as the form of attention has it, as in "full" (whose keys are P narrower). The cache
keeps R + P numbers per token, instead of 2 K H: with the defaults as many as 2.25 heads of "full" need.
Notable: W_k and W_v can be applied to queries and results instead of keys and values. A decoding step does that: it is
attention with a single key head whose keys and values are what the cache holds, so nothing of size S x N x H is made
and no slice of the cache is copied. Prompts long enough that keys cost less to make than wider scores, and
everything without a cache, make keys and values. The keys are wider than the values; the forms of attention take that.
With fewer kv heads than heads, groups of queries share what is made of c.
Where positions are not rotary, and in cross-attention, there is nothing beside c.
Paper: DeepSeek-V2, arXiv 2405.04434.
Left out: norms of queries and keys per head, which W_k could not be moved past; the paper's shift of the scale for
texts longer than trained on (YaRN).

Dims: B batch, T query time, S key time, D embed, N heads, K kv heads, H head dim, R rank, P rotary dim, C = R + P.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import positions as position_encodings
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.models.norms import Norm
from fastlm.models.weights import normal, weight
from fastlm.ops import attention
from fastlm.ops.caches import written
from fastlm.ops.contract import contract, dense
from fastlm.ops.masks import MaskSpec


@dataclasses.dataclass(frozen=True)
class LatentOptions:
    """Options of "latent".

    Attributes:
      rank: R, width of what keys and values are made from; 0 for 4 H, as in the paper.
      query_rank: width of what queries are made from; 0 to make them from x itself.
      rotary_dim: P, rotated channels beside the H others; 0 for H / 2, as in the paper. None if positions are not
        rotary.
    """

    rank: int = 0
    query_rank: int = 0
    rotary_dim: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.query_rank, self.rotary_dim) < 0:
            raise UserError(
                f"latent: rank, query_rank and rotary_dim must not be negative, got {self.rank}, {self.query_rank} and "
                f"{self.rotary_dim}"
            )
        if self.rotary_dim % 2:
            raise UserError(f"latent: rotary_dim must be even, got {self.rotary_dim}")

    def widths(self, cfg: LayerConfig) -> tuple[int, int]:
        """Returns (R, P) of a layer."""
        rotary = self.rotary_dim or max(cfg.head_dim // 4 * 2, 2)
        return self.rank or 4 * cfg.head_dim, rotary if cfg.rotary else 0


@flax.struct.dataclass
class LatentCache:
    """What a layer remembers of each token, by slot: c behind its norm, then the rotated key."""

    rows: Float[Array, "B S C"]

    def write(self, rows: Float[Array, "B T C"], offset: Int[Array, "B"]) -> "LatentCache":
        """Returns the cache with `rows` at slots `offset[b] ... offset[b] + T - 1` of row b."""
        return LatentCache(written(self.rows, rows, offset))


class LatentAttention(Attention):
    """See the header."""

    @staticmethod
    def check(cfg: LayerConfig, options: LatentOptions) -> None:
        """See `Attention`."""
        if cfg.qk_norm:
            raise UserError("latent: normalizes what queries and keys are made from instead; set qk_norm to False")

    @staticmethod
    def seen(cfg: LayerConfig, options: LatentOptions, length: float) -> float:
        """See `Attention`; keys are wider than values."""
        _, rotary = options.widths(cfg)
        return Attention.seen(cfg, options, length) * (1 + rotary / (2 * cfg.head_dim))

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: LatentOptions, batch: int, slots: int, dtype: Any) -> LatentCache:
        """Returns room for R + P numbers of each of `slots` tokens."""
        return LatentCache(jnp.zeros((batch, slots, sum(options.widths(cfg))), dtype))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: Float[Array, "b N T S"] | None = None,
        cache: LatentCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None, dict[str, Any]]:
        """See `Attention`."""
        del rng
        cfg, angles = self.cfg, self.angles(positions)
        q = self._queries(x, angles)
        if context is not None:
            rows = self._rows(context, angles)
            if cache is not None:
                cache = cache.write(rows, mask.start(x.shape[0]))
        if context is None or mask.offset is not None:  # else the cache was empty
            rows = cache.rows.astype(q.dtype)
        rank, rotary = self.options.widths(cfg)
        # With P = 0 the configured scale, 1 / sqrt(H) by default; otherwise as much smaller as the sums are longer.
        options = {"cap": cfg.attention_softcap, "softmax": self.softmax}
        options["scale"] = cfg.attention_scale * math.sqrt(cfg.head_dim / (cfg.head_dim + rotary))
        attend = lambda q, k, v: attention.dot_product_attention(
            q, k, v, mask, bias, form=self.compute.attention_form, **options
        )
        make_k, make_v = (self._maker(name, rank) for name in ("k", "v"))
        keys_values = lambda: expanded(rows, make_k, make_v, cfg.kv_heads)
        if cache is not None and absorbing_is_cheaper(x.shape[1], cfg, rank, rotary):
            one = rows[:, :, None]
            y = from_latent(attend(into_latent(q, make_k, cfg.kv_heads), one, one), make_v, cfg.kv_heads)
        else:
            y = attend(q, *keys_values())
        aux: dict[str, Any] = {}
        if "qkv" in self.capture:
            aux["qkv"] = (q, *keys_values())
        if "attention" in self.capture:
            aux["attention"] = attention.attention_probabilities(q, keys_values()[0], mask, bias, **options)
        return self.output(y), cache, aux

    def angles(self, positions: Int[Array, "B T"]) -> tuple[Array, Array] | None:
        """Returns the rotation of the P channels at each position, or None where positions do not rotate."""
        cfg = self.cfg
        if not cfg.rotary:
            return None
        width = self.options.widths(cfg)[1]
        return position_encodings.rotary_angles(positions, width, cfg.rotary_base, cfg.rotary_scaling)

    def _queries(self, x: Float[Array, "B T D"], angles: tuple[Array, Array] | None) -> Float[Array, "B T N HP"]:
        """Returns each head's query, its rotated channels last."""
        cfg, rank = self.cfg, self.options.query_rank
        if rank:
            x = self._narrowed(x, "q_latent", rank)
        read = "latent" if rank else "embed"
        split = lambda y: y.reshape(*y.shape[:2], cfg.heads, -1)
        add = cfg.qkv_bias and not rank
        q = split(self.product(x, "q", cfg.heads * cfg.head_dim, "heads", bias=add, read=read))
        if angles is None:
            return q
        rotary = self.product(x, "q_rotary", cfg.heads * 2 * angles[0].shape[-1], "heads", bias=add, read=read)
        return jnp.concatenate([q, position_encodings.rotate(split(rotary), *angles)], axis=-1)

    def _rows(self, x: Float[Array, "B S D"], angles: tuple[Array, Array] | None) -> Float[Array, "B S C"]:
        """Returns what keys and values are made from, the rotated key last."""
        cfg = self.cfg
        latent = self._narrowed(x, "latent", self.options.widths(cfg)[0])
        if angles is None:
            return latent
        key = self.product(x, "k_rotary", 2 * angles[0].shape[-1], None, bias=cfg.qkv_bias)
        return jnp.concatenate([latent, position_encodings.rotate(key[:, :, None], *angles)[:, :, 0]], axis=-1)

    def _narrowed(self, x: Float[Array, "B T D"], name: str, rank: int) -> Float[Array, "B T R"]:
        y = self.product(x, name, rank, None, bias=self.cfg.qkv_bias)
        return Norm("rms_norm", rank, self.cfg.norm_epsilon, axis=None, name=f"{name}_norm")(y)

    def _maker(self, name: str, rank: int) -> Array:
        cfg = self.cfg
        shape = (rank, cfg.kv_heads * cfg.head_dim)
        return weight(self, name, shape, ("latent", "kv_heads"), normal(cfg.init_scale))


def absorbing_is_cheaper(queries: int, cfg: LayerConfig, rank: int, rotary: int) -> bool:
    """Whether `queries` wider scores take fewer products per key and head than making the key and the value."""
    made = 2 * rank * cfg.head_dim * cfg.kv_heads // cfg.heads + queries * (2 * cfg.head_dim + rotary)
    return queries * 2 * (rank + rotary) <= made


def expanded(
    rows: Float[Array, "B S C"], make_k: Float[Array, "R KH"], make_v: Float[Array, "R KH"], kv_heads: int
) -> tuple[Float[Array, "B S K HP"], Float[Array, "B S K H"]]:
    """Returns keys, the rotated channels of all heads last, and values."""
    rank = make_k.shape[0]
    split = lambda y: y.reshape(*y.shape[:2], kv_heads, -1)
    k, v = (split(contract(rows[..., :rank], w)) for w in (make_k, make_v))
    if rows.shape[-1] > rank:
        rotary = jnp.broadcast_to(rows[:, :, None, rank:], (*k.shape[:3], rows.shape[-1] - rank))
        k = jnp.concatenate([k, rotary], axis=-1)
    return k, v


def into_latent(q: Float[Array, "B T N HP"], make_k: Float[Array, "R KH"], kv_heads: int) -> Float[Array, "B T N C"]:
    """Returns queries whose products with cached rows are those of `q` with the keys made of them."""
    w = _by_head(make_k, q.dtype, kv_heads)
    width = w.shape[-1]
    grouped = q[..., :width].reshape(*q.shape[:2], kv_heads, -1, width)
    moved = jnp.einsum("BTKGH,RKH->BTKGR", grouped, w, preferred_element_type=jnp.float32).astype(q.dtype)
    return jnp.concatenate([moved.reshape(*q.shape[:3], -1), q[..., width:]], axis=-1)


def from_latent(y: Float[Array, "B T N C"], make_v: Float[Array, "R KH"], kv_heads: int) -> Float[Array, "B T N H"]:
    """Returns the values that weighted sums of cached rows stand for."""
    w = _by_head(make_v, y.dtype, kv_heads)
    grouped = y[..., : w.shape[0]].reshape(*y.shape[:2], kv_heads, -1, w.shape[0])
    made = jnp.einsum("BTKGR,RKH->BTKGH", grouped, w, preferred_element_type=jnp.float32).astype(y.dtype)
    return made.reshape(*y.shape[:3], -1)


def _by_head(w: Array, dtype: Any, kv_heads: int) -> Float[Array, "R K H"]:
    w = dense(w).astype(dtype)
    return w.reshape(w.shape[0], kv_heads, -1)
