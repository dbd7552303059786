"""Llama (arXiv 2302.13971; SmolLM2 is one), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388).

Notable: one table; which biases and norms exist follows from the config. A window of attention is refused
only where the context is longer than it, so a Mistral is read by asking for a shorter context.
Rotary scaling: llama3 as it is; "linear" is llama3's with no wavelength short enough to be kept.
Left out: other rotary scalings, mixtures of experts, biases in only some of Llama's projections.
"""

import dataclasses
from typing import Any

from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import TRANSPOSED, Architecture, Head, Row, norm, projection

_ROTARY = {"default": "default", "linear": "linear", "llama3": "llama3"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _shared_fields(options: Options) -> dict[str, Any]:
    heads, width = options.integer("num_attention_heads"), options.integer("hidden_size")
    kv_heads = options.integer("num_key_value_heads", heads)
    return {
        "family": "decoder",
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("max_position_embeddings", 2048),
        "layers": options.integer("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_dim": options.integer("head_dim", 0),
        "feed_forward": options.choice("hidden_act", {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}, "silu"),
        "feed_forward_width": options.integer("intermediate_size"),
        "norm": "rms_norm",
        "norm_place": "pre",
        "norm_epsilon": options.number("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "tied_embeddings": options.flag("tie_word_embeddings", False),
        "init_scale": options.number("initializer_range", 0.02),
        "residual_init": "same",
    } | _rotary_fields(options)


def _rotary_fields(options: Options) -> dict[str, Any]:
    """Reads today's `rope_parameters`, or `rope_theta` and `rope_scaling` of before."""
    rotary = options.section("rope_parameters") or options.section("rope_scaling") or Options({}, options.where)
    base = rotary.number("rope_theta", options.number("rope_theta", 10_000.0))
    kind = rotary.choice("rope_type" if "rope_type" in rotary else "type", _ROTARY, "default")
    rotary.require({"partial_rotary_factor": (1, 1.0)})
    scaling: tuple[float, ...] = ()
    if kind == "llama3":
        scaling = tuple(rotary.number(key) for key in _LLAMA3)
        if min(scaling) <= 0 or scaling[1] >= scaling[2]:
            raise rotary.error("factor", f"{scaling} must be positive, with low_freq_factor below high_freq_factor")
    if kind == "linear":
        scaling = linear_scaling(rotary.number("factor"))
        if scaling[0] <= 0:
            raise rotary.error("factor", f"must be positive, not {scaling[0]}")
    return {"rotary_base": base, "rotary_scaling": scaling}


def linear_scaling(factor: float) -> tuple[float, ...]:
    """Returns the `rotary_scaling` that divides every frequency by `factor`."""
    # Within a length of 1 no pair turns the 1e9 times from which llama3 begins to keep its frequency.
    return (factor, 1e9, 2e9, 1.0)


def _rotary_options(cfg: ModelConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rotary_base}
    if cfg.rotary_scaling and cfg.rotary_scaling == linear_scaling(cfg.rotary_scaling[0]):
        parameters |= {"rope_type": "linear", "factor": cfg.rotary_scaling[0]}
    elif cfg.rotary_scaling:
        parameters |= {"rope_type": "llama3"} | dict(zip(_LLAMA3, cfg.rotary_scaling))
        parameters[_LLAMA3[-1]] = int(parameters[_LLAMA3[-1]])
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"} if cfg.rotary_scaling else None
    # The last two are what transformers before 5 reads.
    return {"rope_parameters": parameters, "rope_theta": cfg.rotary_base, "rope_scaling": scaling}


def _options(cfg: ModelConfig) -> dict[str, Any]:
    layer = cfg.layer(0)
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.width,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}.get(layer.feed_forward),
        "intermediate_size": layer.feed_forward_width,
        "rms_norm_eps": cfg.norm_epsilon,
        "tie_word_embeddings": cfg.tied_embeddings,
        "initializer_range": cfg.init_scale,
        "attention_dropout": 0.0,
    } | _rotary_options(cfg)


def _llama_fields(options: Options, names: set[str]) -> dict[str, Any]:
    attention, feed_forward = options.flag("attention_bias", False), options.flag("mlp_bias", False)
    if attention != feed_forward:
        raise options.error(
            "attention_bias", f"{attention} with mlp_bias {feed_forward} is not supported; both or none"
        )
    return _shared_fields(options) | {"bias": attention}


def _llama_options(cfg: ModelConfig) -> dict[str, Any]:
    return _options(cfg) | {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}


def _mistral_fields(options: Options, names: set[str]) -> dict[str, Any]:
    return _shared_fields(options) | {"window": options.integer("sliding_window", 0)}


def _qwen_window(options: Options) -> dict[str, Any]:
    kinds = options.values.get("layer_types")
    windowed = options.flag("use_sliding_window", False) or (isinstance(kinds, list) and "sliding_attention" in kinds)
    return {"window": options.integer("sliding_window", 0) if windowed else 0}


def _qwen2_fields(options: Options, names: set[str]) -> dict[str, Any]:
    return _shared_fields(options) | {"qkv_bias": True} | _qwen_window(options)


def _qwen3_fields(options: Options, names: set[str]) -> dict[str, Any]:
    fields = _shared_fields(options) | {"qk_norm": True} | _qwen_window(options)
    return fields | {"head_dim": options.integer("head_dim", 128)}


def _without_window(cfg: ModelConfig) -> dict[str, Any]:
    return _options(cfg) | {"sliding_window": None, "use_sliding_window": False}


def _heads(name: str) -> dict[str, Head]:
    return {
        f"{name}ForCausalLM": Head("language_model", (Row("head/kernel", "lm_head.weight", TRANSPOSED),)),
        f"{name}Model": Head("none", prefixed=False),
    }


LLAMA = Architecture(
    model_type="llama",
    prefix="model.",
    rows=(
        Row("embedding/table", "embed_tokens.weight", copies=("lm_head.weight",)),
        *norm("layers/{i}/attention_norm", "layers.{i}.input_layernorm"),
        *projection("layers/{i}/attention/q", "layers.{i}.self_attn.q_proj"),
        *projection("layers/{i}/attention/k", "layers.{i}.self_attn.k_proj"),
        *projection("layers/{i}/attention/v", "layers.{i}.self_attn.v_proj"),
        *projection("layers/{i}/attention/out", "layers.{i}.self_attn.o_proj"),
        *norm("layers/{i}/attention/q_norm", "layers.{i}.self_attn.q_norm"),
        *norm("layers/{i}/attention/k_norm", "layers.{i}.self_attn.k_norm"),
        *norm("layers/{i}/feed_forward_norm", "layers.{i}.post_attention_layernorm"),
        *projection("layers/{i}/feed_forward/gate", "layers.{i}.mlp.gate_proj"),
        *projection("layers/{i}/feed_forward/up", "layers.{i}.mlp.up_proj"),
        *projection("layers/{i}/feed_forward/down", "layers.{i}.mlp.down_proj"),
        *norm("final_norm", "norm"),
    ),
    heads=_heads("Llama"),
    fields=_llama_fields,
    options=_llama_options,
    accepted={"pretraining_tp": (1,), "quantization_config": ()},
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    heads=_heads("Mistral"),
    fields=_mistral_fields,
    options=_without_window,
    accepted={"quantization_config": ()},
)
QWEN2 = dataclasses.replace(MISTRAL, model_type="qwen2", heads=_heads("Qwen2"), fields=_qwen2_fields)
QWEN3 = dataclasses.replace(
    MISTRAL,
    model_type="qwen3",
    heads=_heads("Qwen3"),
    fields=_qwen3_fields,
    accepted={"attention_bias": (False,), "quantization_config": ()},
)
