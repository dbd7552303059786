"""Attention kinds: one file, one module and one line of `KINDS` each.

A kind is a Linen module built as `Module(layer_config, compute, capture, options)` (see `projections`) and called as
`(x, context, *, positions, mask, bias, cache, rng) -> (y, cache, aux)`. A config names it with or without options,
"local" or "local(window=64)". Its `KINDS` entry declares what it can do; what a model needs beyond that is an error
while building it.
"""

import dataclasses
from typing import Any

from fastlm import configuration
from fastlm.errors import UserError, nearest
from fastlm.models.attention.block_sparse import BlockSparseAttention, BlockSparseOptions
from fastlm.models.attention.chunk import ChunkAttention, ChunkOptions
from fastlm.models.attention.dilated import DilatedAttention, DilatedOptions
from fastlm.models.attention.full import FullAttention
from fastlm.models.attention.gated_delta import GatedDeltaAttention, GatedDeltaOptions
from fastlm.models.attention.gated_linear import GatedLinearAttention, GatedLinearOptions
from fastlm.models.attention.hierarchical import HierarchicalAttention, HierarchicalOptions
from fastlm.models.attention.latent import LatentAttention, LatentOptions
from fastlm.models.attention.linear import LinearAttention
from fastlm.models.attention.linformer import LinformerAttention, LinformerOptions
from fastlm.models.attention.local import LocalAttention, LocalOptions
from fastlm.models.attention.lsh import LshAttention, LshOptions
from fastlm.models.attention.performer import PerformerAttention, PerformerOptions
from fastlm.models.attention.projections import Attention, NoOptions
from fastlm.models.attention.transformer_xl import TransformerXLAttention, TransformerXLOptions
from fastlm.models.config import LayerConfig, ModelConfig
from fastlm.ops import softmax


@dataclasses.dataclass(frozen=True)
class Kind:
    """An attention kind and what it can do.

    Attributes:
      module: see `projections.Attention`.
      options: frozen dataclass of what may stand in parentheses behind the name.
      causal: a token may be kept from seeing later ones.
      bidirectional: a token may see later ones.
      packed: documents in one row may be kept apart.
      cross: queries and keys may come from different sequences.
      decode: it runs step by step with a cache.
      rewinds: that cache forgets its last tokens when its length goes back: it keeps each by its slot.
      carry: that cache has one size however long the text, and may begin a row that goes on with a document.
      rounds: that cache may keep its tokens in eight bits.
      bias: it takes the biases of alibi and relative positions.
      softmax: its weights come from `ops.softmax`, any kind of it.
      fused_softmax: a platform's fused kernel may compute it.
    """

    module: type[Attention]
    options: type = NoOptions
    causal: bool = False
    bidirectional: bool = False
    packed: bool = False
    cross: bool = False
    decode: bool = False
    rewinds: bool = False
    carry: bool = False
    rounds: bool = False
    bias: bool = False
    softmax: bool = False
    fused_softmax: bool = False


KINDS: dict[str, Kind] = {
    "full": Kind(
        FullAttention,
        causal=True,
        bidirectional=True,
        packed=True,
        cross=True,
        decode=True,
        rewinds=True,
        rounds=True,
        bias=True,
        softmax=True,
        fused_softmax=True,
    ),
    "latent": Kind(
        LatentAttention,
        LatentOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        cross=True,
        decode=True,
        rewinds=True,
        bias=True,
        softmax=True,
        fused_softmax=True,
    ),
    "local": Kind(
        LocalAttention,
        LocalOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        carry=True,
        rounds=True,
        softmax=True,
    ),
    "chunk": Kind(
        ChunkAttention,
        ChunkOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        carry=True,
        rounds=True,
        softmax=True,
    ),
    "dilated": Kind(
        DilatedAttention,
        DilatedOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        softmax=True,
    ),
    "block_sparse": Kind(
        BlockSparseAttention,
        BlockSparseOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        softmax=True,
    ),
    "lsh": Kind(
        LshAttention,
        LshOptions,
        causal=True,
        bidirectional=True,
        packed=True,
    ),
    "hierarchical": Kind(
        HierarchicalAttention,
        HierarchicalOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        softmax=True,
    ),
    "linformer": Kind(
        LinformerAttention,
        LinformerOptions,
        bidirectional=True,
        cross=True,
        softmax=True,
        fused_softmax=True,
    ),
    "linear": Kind(
        LinearAttention,
        causal=True,
        bidirectional=True,
        packed=True,
        cross=True,
        decode=True,
        carry=True,
    ),
    "performer": Kind(
        PerformerAttention,
        PerformerOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        cross=True,
        decode=True,
        carry=True,
    ),
    "gated_linear": Kind(
        GatedLinearAttention,
        GatedLinearOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        carry=True,
    ),
    "gated_delta": Kind(
        GatedDeltaAttention,
        GatedDeltaOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        carry=True,
    ),
    "transformer_xl": Kind(
        TransformerXLAttention,
        TransformerXLOptions,
        causal=True,
        bidirectional=True,
        packed=True,
        decode=True,
        carry=True,
        softmax=True,
    ),
}

NEEDS = {
    "causal": "hide later tokens, as a decoder has to",
    "bidirectional": "look ahead, as an encoder has to",
    "packed": "keep the documents of one row apart; use rows of one text each",
    "cross": "look at another sequence",
    "decode": "run step by step with a cache",
    "carry": "go on from row to row",
    "bias": "take the biases of alibi or relative positions; choose other positions",
    "softmax": "use another softmax than 'exact': it has none",
}


def require(spec: str, *needs: str, key: str = "attention") -> Kind:
    """Returns the kind that `spec` names if it can do all of `needs` (names of `Kind`'s flags).

    Args:
      key: which key of the model's config named it.

    Raises:
      UserError: no such kind, or it cannot do one of them.
    """
    found = kind(spec, key)
    for need in needs:
        if not getattr(found, need):
            able = ", ".join(name for name, other in KINDS.items() if getattr(other, need))
            raise UserError(f"config.model.{key}: kind '{spec}' cannot {NEEDS[need]} (these can: {able})")
    return found


def kind(spec: str, key: str = "attention") -> Kind:
    """Returns the entry of `KINDS` that `spec` names.

    Raises:
      UserError: no such kind.
    """
    name, _ = configuration.call(spec, f"config.model.{key}")
    if name not in KINDS:
        hint = nearest(name, KINDS) or f"; one of: {', '.join(KINDS)}"
        raise UserError(f"config.model.{key}: unknown kind '{name}'{hint}")
    return KINDS[name]


def options(spec: str, key: str = "attention") -> Any:
    """Returns the options that `spec` gives its kind.

    Raises:
      UserError: no such option, or a value it cannot have.
    """
    name, values = configuration.call(spec, f"config.model.{key}")
    with configuration.naming(f"model.{key}"):
        return configuration.make(kind(spec, key).options, f"model.{key}: {name}", values)


def make(spec: str, layer: LayerConfig, *arguments: Any, key: str = "attention", **more: Any) -> Attention:
    """Returns the module that `spec` describes."""
    return kind(spec, key).module(layer, *arguments, options=options(spec, key), **more)


def empty_cache(spec: str, layer: LayerConfig, batch: int, slots: int, dtype: Any, key: str = "attention") -> Any:
    """Returns what a layer of this kind remembers before the first token; all zeros.

    Raises:
      UserError: the kind cannot decode.
    """
    module = require(spec, "decode", key=key).module
    return module.empty_cache(layer, options(spec, key), batch, slots, dtype)


def converted(old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """Returns where `new` has another kind of attention than `old`, or the same with other options.

    Paths of their parameters, "layers/3/attention", of layers that both have.
    """
    found = []
    for i in range(min(old.total_layers, new.total_layers)):
        one, other = old.layer(i), new.layer(i)
        for key in ("attention", "cross_attention") if one.cross and other.cross else ("attention",):
            described = [(kind(spec, key), options(spec, key)) for spec in (getattr(one, key), getattr(other, key))]
            found += [f"layers/{i}/{key}"] if described[0] != described[1] else []
    return tuple(found)


def check_layer(layer: LayerConfig, positions: str) -> None:
    """Checks that the kinds of a layer exist and can do what it and its positions need.

    Raises:
      UserError: what cannot work, naming the key.
    """
    specs = {"attention": layer.attention} | ({"cross_attention": layer.cross_attention} if layer.cross else {})
    for key, spec in specs.items():
        needs = ["cross"] if key == "cross_attention" else ["causal" if layer.causal else "bidirectional"]
        if positions in ("alibi", "relative") and key == "attention":
            needs.append("bias")
        if softmax.make(layer.softmax) != softmax.Exact():
            needs.append("softmax")
        found = require(spec, *needs, key=key)
        if layer.attention_softcap and not found.softmax:
            raise UserError(f"config.model.attention_softcap: kind '{spec}' has no scores to cap; set it to 0")
        with configuration.naming(f"model.{key}"):
            found.module.check(layer.across if key == "cross_attention" else layer, options(spec, key))
