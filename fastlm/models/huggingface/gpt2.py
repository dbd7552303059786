"""GPT-2: table and config.

Notable: its Conv1D keeps weights [in, out] as we do, with q, k and v side by side in one.
Left out: cross-attention, attention scaled by the number of the layer.
"""

from typing import Any

from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.bert import ACTIVATION_NAMES, ACTIVATIONS
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import PACKED, TRANSPOSED, Architecture, Head, Row, norm

_Q, _K, _V = (f"layers/{{i}}/attention/{name}" for name in "qkv")


def _conv1d(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(ours, f"{theirs}.weight"), Row(f"{ours}_bias", f"{theirs}.bias")


def _fields(options: Options, names: set[str]) -> dict[str, Any]:
    width = options.integer("n_embd")
    return {
        "family": "decoder",
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("n_positions", 1024),
        "layers": options.integer("n_layer"),
        "width": width,
        "heads": options.integer("n_head"),
        "feed_forward": options.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "feed_forward_width": options.integer("n_inner", 4 * width),
        "norm": "layer_norm",
        "norm_place": "pre",
        "norm_epsilon": options.number("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "bias": True,
        "attention_scale": 0.0 if options.flag("scale_attn_weights", True) else 1.0,
        "tied_embeddings": options.flag("tie_word_embeddings", True),
        "dropout": options.number("resid_pdrop", 0.1),
        "init_scale": options.number("initializer_range", 0.02),
        "residual_init": "scaled",
    }


def _options(cfg: ModelConfig) -> dict[str, Any]:
    layer = cfg.layer(0)
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_length,
        "n_layer": cfg.layers,
        "n_embd": cfg.width,
        "n_head": layer.heads,
        "activation_function": ACTIVATION_NAMES.get(layer.feed_forward),
        "n_inner": layer.feed_forward_width,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "scale_attn_weights": cfg.attention_scale != 1.0,
        "tie_word_embeddings": cfg.tied_embeddings,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": cfg.init_scale,
    }


GPT2 = Architecture(
    model_type="gpt2",
    prefix="transformer.",
    rows=(
        Row("embedding/table", "wte.weight", copies=("lm_head.weight",)),
        Row("embedding/positions", "wpe.weight"),
        *norm("layers/{i}/attention_norm", "h.{i}.ln_1"),
        Row((_Q, _K, _V), "h.{i}.attn.c_attn.weight", PACKED),
        Row((f"{_Q}_bias", f"{_K}_bias", f"{_V}_bias"), "h.{i}.attn.c_attn.bias", PACKED),
        *_conv1d("layers/{i}/attention/out", "h.{i}.attn.c_proj"),
        *norm("layers/{i}/feed_forward_norm", "h.{i}.ln_2"),
        *_conv1d("layers/{i}/feed_forward/up", "h.{i}.mlp.c_fc"),
        *_conv1d("layers/{i}/feed_forward/down", "h.{i}.mlp.c_proj"),
        *norm("final_norm", "ln_f"),
    ),
    heads={
        "GPT2LMHeadModel": Head("language_model", (Row("head/kernel", "lm_head.weight", TRANSPOSED),)),
        "GPT2Model": Head("none", prefixed=False),
    },
    fields=_fields,
    options=_options,
    accepted={
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (),
    },
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
