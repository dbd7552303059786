"""T5 (arXiv 1910.10683), version 1.0 and 1.1 (gated, with a vocabulary head of its own; FLAN-T5 is one).

Notable: scores are not scaled, distances add a learned bias kept in the first layer of a stack. Whether the
head is tied has to be seen from the tensors: older config.json say `tie_word_embeddings: false` of a
1.1, newer ones always true, and mean by it (or by `scale_decoder_outputs`) that the hidden state is
scaled before the head. There is no longest text; `n_positions` says what it was trained on.
"""

from typing import Any

from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import TRANSPOSED, Architecture, Head, Row, norm

_FEED_FORWARDS = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "silu": "silu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
_FEED_FORWARD_NAMES = {kind: name for name, kind in _FEED_FORWARDS.items()}
_HEAD = "lm_head.weight"


def _fields(options: Options, names: set[str]) -> dict[str, Any]:
    width, encoder_layers = options.integer("d_model"), options.integer("num_layers")
    scaled = options.flag("scale_decoder_outputs", options.flag("tie_word_embeddings", True))
    return {
        "family": "encoder_decoder",
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("n_positions", 512),
        "encoder_layers": encoder_layers,
        "layers": options.integer("num_decoder_layers", encoder_layers),
        "width": width,
        "heads": options.integer("num_heads"),
        "head_dim": options.integer("d_kv"),
        "feed_forward": options.choice("feed_forward_proj", _FEED_FORWARDS, "relu"),
        "feed_forward_width": options.integer("d_ff"),
        "norm": "rms_norm",
        "norm_place": "pre",
        "norm_epsilon": options.number("layer_norm_epsilon", 1e-6),
        "positions": "relative",
        "relative_buckets": options.integer("relative_attention_num_buckets", 32),
        "relative_distance": options.integer("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "tied_embeddings": scaled or _HEAD not in names,
        "head_scale": width**-0.5 if scaled and width else 1.0,
        "dropout": options.number("dropout_rate", 0.1),
        "residual_init": "same",
    }


def _options(cfg: ModelConfig) -> dict[str, Any]:
    layer, scaled = cfg.layer(0), cfg.head_scale != 1.0
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_length,
        "num_layers": cfg.encoder_layers,
        "num_decoder_layers": cfg.layers,
        "d_model": cfg.width,
        "num_heads": layer.heads,
        "d_kv": layer.head_dim,
        "feed_forward_proj": _FEED_FORWARD_NAMES.get(layer.feed_forward),
        "d_ff": layer.feed_forward_width,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "relative_attention_num_buckets": cfg.relative_buckets,
        "relative_attention_max_distance": cfg.relative_distance,
        "scale_decoder_outputs": scaled,
        "tie_word_embeddings": scaled,
        "dropout_rate": cfg.dropout,
        "is_encoder_decoder": True,
    }


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    names = {"q": "q", "k": "k", "v": "v", "out": "o"}
    return tuple(Row(f"{ours}/{our}", f"{theirs}.{name}.weight", TRANSPOSED) for our, name in names.items())


def _gated(cfg: ModelConfig) -> bool:
    return cfg.layer(0).feed_forward.endswith("glu")


def _feed_forward(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}/up", f"{theirs}.wi.weight", TRANSPOSED, when=lambda cfg: not _gated(cfg)),
        Row(f"{ours}/gate", f"{theirs}.wi_0.weight", TRANSPOSED),
        Row(f"{ours}/up", f"{theirs}.wi_1.weight", TRANSPOSED, when=_gated),
        Row(f"{ours}/down", f"{theirs}.wo.weight", TRANSPOSED),
    )


def _rows() -> tuple[Row, ...]:
    encoder, decoder = "encoder.block.{e}.layer", "decoder.block.{i}.layer"
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(
            "embedding/table",
            "shared.weight",
            copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _HEAD),
        ),
        Row("encoder/relative_bias/table", f"encoder.{bias}"),
        *norm("layers/{e}/attention_norm", f"{encoder}.0.layer_norm"),
        *_attention("layers/{e}/attention", f"{encoder}.0.SelfAttention"),
        *norm("layers/{e}/feed_forward_norm", f"{encoder}.1.layer_norm"),
        *_feed_forward("layers/{e}/feed_forward", f"{encoder}.1.DenseReluDense"),
        *norm("encoder/final_norm", "encoder.final_layer_norm"),
        Row("relative_bias/table", f"decoder.{bias}"),
        *norm("layers/{i}/attention_norm", f"{decoder}.0.layer_norm"),
        *_attention("layers/{i}/attention", f"{decoder}.0.SelfAttention"),
        *norm("layers/{i}/cross_attention_norm", f"{decoder}.1.layer_norm"),
        *_attention("layers/{i}/cross_attention", f"{decoder}.1.EncDecAttention"),
        *norm("layers/{i}/feed_forward_norm", f"{decoder}.2.layer_norm"),
        *_feed_forward("layers/{i}/feed_forward", f"{decoder}.2.DenseReluDense"),
        *norm("final_norm", "decoder.final_layer_norm"),
    )


T5 = Architecture(
    model_type="t5",
    prefix="",
    rows=_rows(),
    heads={"T5ForConditionalGeneration": Head("language_model", (Row("head/kernel", _HEAD, TRANSPOSED),))},
    fields=_fields,
    options=_options,
    accepted={"is_encoder_decoder": (True,), "is_decoder": (False,), "quantization_config": ()},
    # An early version saved a bias that nothing reads.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
