"""What a model is (`ModelConfig`) and how it is computed (`Compute`).

Notable: `ModelConfig` describes a concrete architecture, is saved beside the weights and suffices to
rebuild them. A field of the per-layer group takes one value or a tuple: kinds are patterns tiled
over the layers (`("local", "local", "full")`), sizes are one per layer. `layer(i)` resolves them.
`Compute` never changes what is stored, only how it runs.
"""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp

from fastlm import configuration
from fastlm.errors import UserError, nearest
from fastlm.models import formats
from fastlm.ops.attention import FORMS

FAMILIES = ("decoder", "encoder", "encoder_decoder")
FEED_FORWARDS = ("gelu", "gelu_exact", "relu", "relu2", "silu", "swiglu", "geglu")
NORMS = ("layer_norm", "rms_norm")
NORM_PLACES = ("pre", "post")
POSITIONS = ("none", "sinusoidal", "learned", "rotary", "alibi", "relative")
HEADS = ("language_model", "masked_language_model", "sequence", "tokens", "none")
POOLERS = ("", "tanh", "relu")
POOLING = ("first", "last", "mean")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
CACHE_DTYPES = ("", "int8")
REMAT = ("none", "products", "full")

KINDS_PER_LAYER = ("attention", "cross_attention", "feed_forward")
SIZES_PER_LAYER = ("heads", "kv_heads", "head_dim", "feed_forward_width")


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer, every value concrete."""

    width: int
    causal: bool
    cross: bool
    max_length: int
    attention: str
    cross_attention: str
    softmax: str
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: str
    feed_forward_width: int
    norm: str
    norm_place: str
    norm_epsilon: float
    rotary: bool
    rotary_base: float
    rotary_scaling: tuple[float, ...]
    qk_norm: bool
    attention_scale: float
    attention_softcap: float
    bias: bool
    qkv_bias: bool
    dropout: float
    init_scale: float
    residual_init_scale: float
    fused: bool

    @property
    def across(self) -> "LayerConfig":
        """The layer as its cross-attention sees it.

        Words and their source have no common order: nothing is hidden, and no rotary angle measures between them. What
        is asked and what is looked at are two inputs, whose products stay apart.
        """
        return dataclasses.replace(self, rotary=False, causal=False, fused=False)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A concrete architecture. Zero for a size means "derive it", which `layer(i)` does.

    Layers are numbered through: in an encoder-decoder, 0 ... encoder_layers - 1 are the encoder's and the
    decoder's follow, so per-layer tuples, parameter paths and whatever prunes by layer know one count.

    Attributes:
      family: "decoder" sees the past only, "encoder" everything; "encoder_decoder" has both, the decoder
        with cross-attention.
      vocab_size: V; 0 in a config file means "what the tokenizer has".
      max_length: longest context T; rows of the table of learned positions.
      layers, encoder_layers: of the only or the decoder's stack; of the encoder's, 0 in the other families.
      token_types: rows of BERT's table of segment types; 0 for none.
      position_offset: learned position p is row p + offset (2 in RoBERTa and BART).
      embedding_norm: normalize the embedded tokens; embedding_scale: multiply them (Marian: sqrt(width)).
      heads, kv_heads, head_dim, feed_forward_width: N, K, H, F; a tuple gives one per layer.
      kv_heads: 0 means as many as heads. head_dim: 0 means width / heads.
      feed_forward_width: 0 means 4 x width, or 8/3 x width (to a multiple of 64) for gated kinds.
      attention, cross_attention, feed_forward: a kind, or a pattern of kinds tiled over the layers. Kinds of
        attention may have options, "local(window=64)"; see `attention.KINDS`.
      softmax: how scores become probabilities, in every kind that has any; see `ops.softmax.KINDS`.
      positions: "relative" is T5's learned bias over `relative_buckets` distances up to `relative_distance`
        (arXiv 1910.10683), one table per stack.
      rotary_scaling: Llama 3's stretching of long wavelengths as (factor, low frequency factor, high
        frequency factor, original length); empty for none.
      bias: biases in the projections and in LayerNorm; qkv_bias: in q, k and v (Qwen2), whatever `bias` says.
      attention_scale: multiplies q.k; 0 means 1 / sqrt(head_dim).
      head: "language_model", "masked_language_model" (BERT's transform before the vocabulary), "sequence"
        (`classes` numbers per text), "tokens" (`classes` numbers per token), "none".
      head_bias: a bias on the logits; head_scale multiplies what goes into the vocabulary (T5: width^-0.5).
      pooler: activation of a layer on the pooled token before a "sequence" head; "" for none.
      pooling: which hidden state stands for a text: the first, the last, or the mean.
      attention_softcap, logit_softcap: cap * tanh(x / cap); 0 is off.
      init_scale: standard deviation of the initial weights.
      residual_init: "scaled" divides the projections into the residual stream by sqrt(2 layers)
        (GPT-2), "zero" starts them at 0 so that each block starts as the identity, "same" does neither.
      formats: ordered (path regex, leaf format), see `formats`; empty for plain weights.
      fused: weights that multiply the same input are one weight, see `fusion`, which makes such models for decoding.
    """

    family: str = "decoder"
    vocab_size: int = 0
    max_length: int = 1024
    layers: int = 6
    encoder_layers: int = 0
    width: int = 384
    heads: int | tuple[int, ...] = 6
    kv_heads: int | tuple[int, ...] = 0
    head_dim: int | tuple[int, ...] = 0
    attention: str | tuple[str, ...] = "full"
    cross_attention: str | tuple[str, ...] = "full"
    softmax: str = "exact"
    feed_forward: str | tuple[str, ...] = "gelu"
    feed_forward_width: int | tuple[int, ...] = 0
    norm: str = "layer_norm"
    norm_place: str = "pre"
    norm_epsilon: float = 1e-5
    positions: str = "rotary"
    position_offset: int = 0
    rotary_base: float = 10_000.0
    rotary_scaling: tuple[float, ...] = ()
    relative_buckets: int = 32
    relative_distance: int = 128
    token_types: int = 0
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    qk_norm: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied_embeddings: bool = True
    bias: bool = False
    qkv_bias: bool = False
    head: str = "language_model"
    head_bias: bool = False
    head_scale: float = 1.0
    classes: int = 0
    pooler: str = ""
    pooling: str = "first"
    dropout: float = 0.0
    init_scale: float = 0.02
    residual_init: str = "scaled"
    formats: tuple[tuple[str, str], ...] = ()
    fused: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_names(self)
        for name in KINDS_PER_LAYER + SIZES_PER_LAYER:
            _check_per_layer(self, name)
        for i in range(self.total_layers):
            _check_layer(self.layer(i), i, self.positions, divides=not self._at("head_dim", i))
        for stack in (self.encoder_stack, self.stack):
            if self.positions == "relative" and len({self.layer(i).heads for i in stack}) > 1:
                raise UserError(
                    "config.model.heads: with relative positions the layers of a stack share one table; give one number"
                )

    @property
    def total_layers(self) -> int:
        """Layers of all stacks."""
        return self.encoder_layers + self.layers

    @property
    def stack(self) -> range:
        """Numbers of the layers of the only, or the decoder's, stack."""
        return range(self.encoder_layers, self.total_layers)

    @property
    def encoder_stack(self) -> range:
        """Numbers of the layers of an encoder-decoder's encoder."""
        return range(self.encoder_layers)

    def _at(self, name: str, i: int) -> Any:
        value = getattr(self, name)
        return value[i % len(value)] if isinstance(value, tuple) else value

    def layer(self, i: int) -> LayerConfig:
        """Returns layer `i` with every size and kind resolved."""
        heads, kind = self._at("heads", i), self._at("feed_forward", i)
        gated = kind.endswith("glu")
        default_width = -(-self.width * 8 // 3 // 64) * 64 if gated else 4 * self.width
        in_encoder = self.family == "encoder" or i < self.encoder_layers
        return LayerConfig(
            width=self.width,
            causal=not in_encoder,
            cross=self.family == "encoder_decoder" and not in_encoder,
            max_length=self.max_length,
            attention=self._at("attention", i),
            cross_attention=self._at("cross_attention", i),
            softmax=self.softmax,
            heads=heads,
            kv_heads=self._at("kv_heads", i) or heads,
            head_dim=self._at("head_dim", i) or self.width // heads,
            feed_forward=kind,
            feed_forward_width=self._at("feed_forward_width", i) or default_width,
            norm=self.norm,
            norm_place=self.norm_place,
            norm_epsilon=self.norm_epsilon,
            rotary=self.positions == "rotary",
            rotary_base=self.rotary_base,
            rotary_scaling=self.rotary_scaling,
            qk_norm=self.qk_norm,
            attention_scale=self.attention_scale or (self._at("head_dim", i) or self.width // heads) ** -0.5,
            attention_softcap=self.attention_softcap,
            bias=self.bias,
            qkv_bias=self.bias or self.qkv_bias,
            dropout=self.dropout,
            init_scale=self.init_scale,
            residual_init_scale=_residual_scale(self),
            fused=self.fused,
        )

    def in_use(self) -> "ModelConfig":
        """Returns the architecture of the model once it is read: formats for disk alone are gone."""
        return dataclasses.replace(self, formats=formats.for_use(self.formats))

    def plain(self) -> "ModelConfig":
        """Returns the architecture with an array for each weight (see `formats.merged`)."""
        return dataclasses.replace(self, formats=())

    def to_json(self) -> str:
        """Returns the architecture as JSON, one key a line."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Rebuilds what `to_json` wrote.

        Raises:
          UserError: not JSON, or keys this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"model description is not JSON ({error}); the file is damaged") from None
        return configuration.make(cls, "model", values)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model runs: types, rematerialisation and kernels. Nothing here is saved with weights.

    Attributes:
      dtype: type of activations and of the operands of products; sums and softmax are float32.
      residual_dtype: type of the stream that blocks add to.
      remat: what the backward pass recomputes: "none" (stores everything), "products" (stores products with
        weights, recomputes attention and element-wise work), "full" (stores only block inputs).
      attention_form: "auto", or one of `ops.attention.FORMS`.
      loss_chunk: tokens whose logits exist at a time.
      cache_dtype: what decoding keeps keys and values in, in kinds that can round them: "" for dtype, or "int8".
    """

    dtype: str = "float32"
    residual_dtype: str = "float32"
    remat: str = "none"
    attention_form: str = "auto"
    loss_chunk: int = 1024
    cache_dtype: str = ""

    def __post_init__(self) -> None:
        _one_of("compute.dtype", self.dtype, DTYPES)
        _one_of("compute.residual_dtype", self.residual_dtype, DTYPES)
        _one_of("compute.remat", self.remat, REMAT)
        _one_of("compute.attention_form", self.attention_form, ("auto", *FORMS))
        _one_of("compute.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        if self.loss_chunk < 1:
            raise UserError(f"config.compute.loss_chunk: must be at least 1 token, got {self.loss_chunk}")

    @property
    def jnp_dtype(self) -> Any:
        """The compute type as a numpy type."""
        return DTYPES[self.dtype]

    @property
    def jnp_residual_dtype(self) -> Any:
        """The type of the residual stream as a numpy type."""
        return DTYPES[self.residual_dtype]


def _one_of(where: str, value: str, valid: Any) -> None:
    if value not in valid:
        hint = nearest(value, valid) or f"; one of: {', '.join(valid)}"
        raise UserError(f"config.{where}: unknown '{value}'{hint}")


def _residual_scale(cfg: ModelConfig) -> float:
    deep = cfg.init_scale * (2 * max(cfg.layers, cfg.encoder_layers)) ** -0.5
    return {"scaled": deep, "zero": 0.0, "same": cfg.init_scale}[cfg.residual_init]


def _check_sizes(cfg: ModelConfig) -> None:
    for name in ("layers", "width", "max_length"):
        if getattr(cfg, name) < 1:
            raise UserError(f"config.model.{name}: must be at least 1, got {getattr(cfg, name)}")
    for name in ("heads", "kv_heads", "head_dim", "feed_forward_width"):
        value = getattr(cfg, name)
        least = 1 if name == "heads" else 0
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise UserError(f"config.model.{name}: must be at least {least}, got {value}")
    for name in ("encoder_layers", "token_types", "position_offset", "classes", "vocab_size"):
        if getattr(cfg, name) < 0:
            raise UserError(f"config.model.{name}: must not be negative, got {getattr(cfg, name)}")
    if cfg.relative_buckets < 4 or cfg.relative_buckets % 2 or cfg.relative_distance <= cfg.relative_buckets // 2:
        raise UserError(
            f"config.model: relative_buckets must be even and at least 4 and relative_distance above half of it, got "
            f"{cfg.relative_buckets} and {cfg.relative_distance}"
        )
    if len(cfg.rotary_scaling) not in (0, 4):
        raise UserError(f"config.model.rotary_scaling: needs no or four numbers, got {cfg.rotary_scaling}")
    for name in ("norm_epsilon", "rotary_base", "embedding_scale", "head_scale"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise UserError(f"config.model.{name}: must be a positive number, got {getattr(cfg, name)}")
    for name in ("attention_scale", "attention_softcap", "logit_softcap", "init_scale"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"config.model.{name}: must not be negative, got {getattr(cfg, name)}")
    for _, text in cfg.formats:
        formats.parse(text)
    if not 0 <= cfg.dropout < 1:
        raise UserError(f"config.model.dropout: must be in [0, 1), got {cfg.dropout}")


def _check_names(cfg: ModelConfig) -> None:
    _one_of("model.family", cfg.family, FAMILIES)
    _one_of("model.head", cfg.head, HEADS)
    _one_of("model.pooler", cfg.pooler, POOLERS)
    _one_of("model.pooling", cfg.pooling, POOLING)
    if (cfg.encoder_layers > 0) != (cfg.family == "encoder_decoder"):
        raise UserError(
            f"config.model.encoder_layers: {cfg.encoder_layers} does not go with family '{cfg.family}'; an "
            "encoder_decoder needs at least 1, the others have 0"
        )
    if cfg.family == "encoder" and cfg.head == "language_model":
        raise UserError(
            "config.model.head: an encoder sees the words it should predict; use masked_language_model, sequence, "
            "tokens or none"
        )
    _one_of("model.norm", cfg.norm, NORMS)
    _one_of("model.norm_place", cfg.norm_place, NORM_PLACES)
    _one_of("model.positions", cfg.positions, POSITIONS)
    _one_of("model.residual_init", cfg.residual_init, ("scaled", "zero", "same"))
    kinds = cfg.feed_forward if isinstance(cfg.feed_forward, tuple) else (cfg.feed_forward,)
    for kind in kinds:
        _one_of("model.feed_forward", kind, FEED_FORWARDS)


def _check_per_layer(cfg: ModelConfig, name: str) -> None:
    value = getattr(cfg, name)
    if not isinstance(value, tuple):
        return
    if name in SIZES_PER_LAYER and len(value) != cfg.total_layers:
        raise UserError(f"config.model.{name}: {len(value)} values for {cfg.total_layers} layers; give one per layer")
    if not 0 < len(value) <= cfg.total_layers:
        raise UserError(f"config.model.{name}: a pattern of {len(value)} does not tile {cfg.total_layers} layers")


def _check_layer(layer: LayerConfig, i: int, positions: str, *, divides: bool) -> None:
    where = f"config.model, layer {i}"
    if min(layer.heads, layer.kv_heads, layer.head_dim, layer.feed_forward_width) < 1:
        raise UserError(f"{where}: heads, kv_heads, head_dim and feed_forward_width must be positive")
    if divides and layer.heads * layer.head_dim != layer.width:
        raise UserError(
            f"{where}: width {layer.width} is not divided by {layer.heads} heads; set head_dim or change one"
        )
    if layer.heads % layer.kv_heads:
        raise UserError(f"{where}: {layer.kv_heads} kv_heads do not divide {layer.heads} heads")
    if positions == "rotary" and layer.head_dim % 2:
        raise UserError(f"{where}: rotary positions need an even head_dim, got {layer.head_dim}")
