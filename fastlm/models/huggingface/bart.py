"""BART (arXiv 1910.13461) and Marian (1804.00344), which differ in positions, scaling and the norm on embeddings.

Notable: the bias on the logits is a buffer that some files lack; then the model has none. Marian's sinusoidal
positions are computed; where a file holds them, it must hold the same.
Left out: vocabularies of source and target apart, untied vocabularies, classification heads.
"""

import math
from typing import Any

import numpy as np

from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.bert import ACTIVATION_NAMES, ACTIVATIONS
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import ONE_ROW, Architecture, Head, Row, norm, projection

_BIAS = "final_logits_bias"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_ACCEPTED = {
    "tie_word_embeddings": (True,),
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "quantization_config": (),
}


def _shared_fields(options: Options, names: set[str]) -> dict[str, Any]:
    width = options.integer("d_model")
    encoder_layers, layers = options.integer("encoder_layers"), options.integer("decoder_layers")
    per_stack = lambda key: _per_layer(
        options.integer(f"encoder_{key}"), options.integer(f"decoder_{key}"), encoder_layers, layers
    )
    return {
        "family": "encoder_decoder",
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("max_position_embeddings", 1024),
        "encoder_layers": encoder_layers,
        "layers": layers,
        "width": width,
        "heads": per_stack("attention_heads"),
        "feed_forward": options.choice("activation_function", ACTIVATIONS, "gelu"),
        "feed_forward_width": per_stack("ffn_dim"),
        "norm": "layer_norm",
        "norm_place": "post",
        "bias": True,
        "embedding_scale": math.sqrt(width) if options.flag("scale_embedding", False) and width else 1.0,
        "head_bias": _BIAS in names,
        "dropout": options.number("dropout", 0.1),
        "init_scale": options.number("init_std", 0.02),
        "residual_init": "same",
    }


def _per_layer(encoder: int, decoder: int, encoder_layers: int, layers: int) -> int | tuple[int, ...]:
    # Bounded, since both counts come from the file and are not checked yet.
    return decoder if encoder == decoder else (encoder,) * min(encoder_layers, 4096) + (decoder,) * min(layers, 4096)


def _options(cfg: ModelConfig) -> dict[str, Any]:
    encoder, decoder = cfg.layer(0), cfg.layer(cfg.encoder_layers)
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "encoder_layers": cfg.encoder_layers,
        "decoder_layers": cfg.layers,
        "d_model": cfg.width,
        "encoder_attention_heads": encoder.heads,
        "decoder_attention_heads": decoder.heads,
        "activation_function": ACTIVATION_NAMES.get(decoder.feed_forward),
        "encoder_ffn_dim": encoder.feed_forward_width,
        "decoder_ffn_dim": decoder.feed_forward_width,
        "scale_embedding": cfg.embedding_scale != 1.0,
        "dropout": cfg.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": cfg.init_scale,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def _layer(ours: str, theirs: str) -> tuple[Row, ...]:
    attention = ((f"{ours}/attention", f"{theirs}.self_attn"), (f"{ours}/cross_attention", f"{theirs}.encoder_attn"))
    rows: list[Row] = []
    for our, name in attention:
        for letter in "qkv":
            rows += projection(f"{our}/{letter}", f"{name}.{letter}_proj")
        rows += projection(f"{our}/out", f"{name}.out_proj")
        rows += norm(f"{our}_norm", f"{name}_layer_norm")
    return (
        *rows,
        *projection(f"{ours}/feed_forward/up", f"{theirs}.fc1"),
        *projection(f"{ours}/feed_forward/down", f"{theirs}.fc2"),
        *norm(f"{ours}/feed_forward_norm", f"{theirs}.final_layer_norm"),
    )


_STACKS = (
    Row("embedding/table", "shared.weight", copies=_COPIES),
    *_layer("layers/{e}", "encoder.layers.{e}"),
    *_layer("layers/{i}", "decoder.layers.{i}"),
)
_LOGITS = (Row("head/bias", _BIAS, ONE_ROW),)


def _bart_fields(options: Options, names: set[str]) -> dict[str, Any]:
    # BART's LayerNorm has PyTorch's epsilon, which no option changes; so has Marian's.
    learned = {"positions": "learned", "position_offset": 2, "embedding_norm": True, "norm_epsilon": 1e-5}
    return _shared_fields(options, names) | learned


BART = Architecture(
    model_type="bart",
    prefix="model.",
    rows=(
        *_STACKS,
        Row("encoder/embedding/positions", "encoder.embed_positions.weight"),
        Row("embedding/positions", "decoder.embed_positions.weight"),
        *norm("encoder/embedding/norm", "encoder.layernorm_embedding"),
        *norm("embedding/norm", "decoder.layernorm_embedding"),
    ),
    heads={"BartForConditionalGeneration": Head("language_model", _LOGITS)},
    fields=_bart_fields,
    options=_options,
    accepted=_ACCEPTED,
    ignored=(r"(encoder|decoder)\.version",),
)


def _marian_fields(options: Options, names: set[str]) -> dict[str, Any]:
    vocab_size = options.integer("vocab_size")
    if options.integer("decoder_vocab_size", vocab_size) != vocab_size:
        raise options.error("decoder_vocab_size", f"must be vocab_size ({vocab_size}): one vocabulary for both sides")
    return _shared_fields(options, names) | {"positions": "sinusoidal", "norm_epsilon": 1e-5}


def _marian_options(cfg: ModelConfig) -> dict[str, Any]:
    return _options(cfg) | {"decoder_vocab_size": cfg.vocab_size, "share_encoder_decoder_embeddings": True}


def _sinusoids(cfg: ModelConfig) -> np.ndarray:
    frequencies = 10_000.0 ** (-np.arange(0, cfg.width, 2) / cfg.width)
    angles = np.arange(cfg.max_length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[:, : cfg.width]


MARIAN = Architecture(
    model_type="marian",
    prefix="model.",
    rows=_STACKS,
    heads={"MarianMTModel": Head("language_model", _LOGITS)},
    fields=_marian_fields,
    options=_marian_options,
    accepted=_ACCEPTED | {"share_encoder_decoder_embeddings": (True,)},
    computed={"encoder.embed_positions.weight": _sinusoids, "decoder.embed_positions.weight": _sinusoids},
)
