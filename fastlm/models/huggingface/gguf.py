"""GGUF files of the llama architecture (Mistral and SmolLM2 too), qwen2 and qwen3: names and key-values.

Notable: key-values become the options of a config.json, so the rest is the table of `llama.py` under
other names. llama.cpp turns neighbouring channels where transformers turns halves, and for the llama
architecture stores the rows of q and k in that order, which is undone here. Llama 3's rotary scaling is a
tensor of factors there; the parameters are recovered and compared. What is written is what is read.
Left out: mixtures of experts, other rotary scalings, partly rotated heads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlm.errors import UserError, nearest
from fastlm.models.config import LayerConfig, ModelConfig
from fastlm.models.huggingface import llama
from fastlm.models.huggingface.describing import describe, shapes_of
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import (
    TRANSPOSED,
    Architecture,
    How,
    Row,
    Shape,
    Transfer,
    norm,
    projection,
    transfers,
)
from fastlm.models.weight_files import WeightSource

_OPTIONS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_NEEDED = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_TABLE, _FACTORS = "token_embd.weight", "rope_freqs.weight"
_LLAMA3 = (1.0, 4.0, 8192.0)  # of all releases of Llama 3.1 to 3.3; the factor differs


def _halves(tensor: np.ndarray, shapes: Sequence[Shape], layer: LayerConfig | None) -> Sequence[np.ndarray]:
    """Puts rows [heads x (pair, which of two)] into the order [heads x (which of two, pair)], as [in, out]."""
    apart = tensor.reshape(-1, layer.head_dim // 2, 2, *tensor.shape[1:])
    return (apart.swapaxes(1, 2).reshape(tensor.shape).T,)


def _neighbours(ours: Sequence[np.ndarray], layer: LayerConfig | None) -> np.ndarray:
    """Undoes `_halves`."""
    rows = ours[0].T
    apart = rows.reshape(-1, 2, layer.head_dim // 2, *rows.shape[1:])
    return apart.swapaxes(1, 2).reshape(rows.shape)


NEIGHBOURS = How(TRANSPOSED.shape, _halves, _neighbours)


def _query_or_key(letter: str, how: How) -> tuple[Row, ...]:
    ours, theirs = f"layers/{{i}}/attention/{letter}", f"blk.{{i}}.attn_{letter}"
    return Row(ours, f"{theirs}.weight", how), Row(f"{ours}_bias", f"{theirs}.bias", how)


def _architecture(like: Architecture, how: How) -> Architecture:
    rows = (
        Row("embedding/table", "token_embd.weight", copies=("output.weight",)),
        *norm("layers/{i}/attention_norm", "blk.{i}.attn_norm"),
        *_query_or_key("q", how),
        *_query_or_key("k", how),
        *projection("layers/{i}/attention/v", "blk.{i}.attn_v"),
        *projection("layers/{i}/attention/out", "blk.{i}.attn_output"),
        *norm("layers/{i}/attention/q_norm", "blk.{i}.attn_q_norm"),
        *norm("layers/{i}/attention/k_norm", "blk.{i}.attn_k_norm"),
        *norm("layers/{i}/feed_forward_norm", "blk.{i}.ffn_norm"),
        *projection("layers/{i}/feed_forward/gate", "blk.{i}.ffn_gate"),
        *projection("layers/{i}/feed_forward/up", "blk.{i}.ffn_up"),
        *projection("layers/{i}/feed_forward/down", "blk.{i}.ffn_down"),
        *norm("final_norm", "output_norm"),
    )
    head = (Row("head/kernel", "output.weight", TRANSPOSED),)
    heads = {name: dataclasses.replace(old, rows=head if old.rows else ()) for name, old in like.heads.items()}
    return dataclasses.replace(like, prefix="", rows=rows, heads=heads, options=None, ignored=("rope_freqs.weight",))


ARCHITECTURES = {
    "llama": _architecture(llama.LLAMA, NEIGHBOURS),
    "qwen2": _architecture(llama.QWEN2, TRANSPOSED),
    "qwen3": _architecture(llama.QWEN3, TRANSPOSED),
}


def options_of(source: WeightSource, metadata: Mapping[str, Any]) -> tuple[Architecture, Options]:
    """Returns the architecture of a GGUF file and its key-values as options of a config.json.

    Raises:
      UserError: another architecture, a key that is missing, or a variant that is not supported.
    """
    where, name = str(source.path), metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = nearest(name, ARCHITECTURES) if isinstance(name, str) else ""
        raise UserError(f"{where}: unknown GGUF architecture {name!r:.60}{hint}; known: {', '.join(ARCHITECTURES)}")
    own = Options({key.removeprefix(f"{name}."): value for key, value in metadata.items()}, where)
    values = {option: _plain(own.values[key]) for option, key in _OPTIONS.items() if key in own}
    for option in _NEEDED:
        if option not in values:
            raise own.error(f"{name}.{_OPTIONS[option]}", "is missing; the file is damaged or of another kind")
    names = set(source.names())
    if _TABLE in names:
        shape = source.shape(_TABLE)
        if len(shape) != 2:
            raise UserError(f"{where}: tensor '{_TABLE}' has shape {shape}, not (vocabulary, width); it is damaged")
        values["vocab_size"] = shape[0]
    values |= {"model_type": name, "architectures": [next(iter(ARCHITECTURES[name].heads))]}
    values["tie_word_embeddings"] = "output.weight" not in names
    if name == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in names
        values["mlp_bias"] = "blk.0.ffn_up.bias" in names
    options = Options(values, where)
    _check_variant(own, options)
    values |= _rotary(own, options, source, names)
    ids = {option: metadata.get(f"tokenizer.ggml.{key}") for option, key in _IDS.items()}
    values |= {option: value for option, value in ids.items() if value is not None}
    return ARCHITECTURES[name], options


def described(cfg: ModelConfig) -> tuple[str, Sequence[Transfer], dict[str, Any], dict[str, np.ndarray]]:
    """Returns how a model is told to llama.cpp.

    Returns:
      (name of the architecture, where its tensors go, key-values, tensors that are no parameters).

    Raises:
      UserError: llama.cpp's architectures known here do not hold the model; the message says what stands in the way.
    """
    class_name, known, options = describe(cfg)
    name = known.model_type
    if name not in ARCHITECTURES or class_name not in ARCHITECTURES[name].heads or cfg.head != "language_model":
        raise UserError(f"gguf: holds decoders that write ({', '.join(ARCHITECTURES)}), not a {class_name}")
    architecture = ARCHITECTURES[name]
    moved, _ = transfers(architecture, architecture.heads[class_name], cfg, shapes_of(cfg))
    head_dim = cfg.layer(0).head_dim
    values = {_OPTIONS[option]: options[option] for option in _OPTIONS if options.get(option) is not None}
    values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    values |= {"rope.dimension_count": head_dim, "vocab_size": cfg.vocab_size}
    more, scaling = {}, options.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    elif cfg.rotary_scaling:
        factor, *parameters = cfg.rotary_scaling
        if tuple(parameters) != _LLAMA3:
            raise UserError(f"gguf: rotary scaling {cfg.rotary_scaling} is not that of Llama 3; others have no form")
        more[_FACTORS] = _llama3_factors(factor, head_dim, cfg.rotary_base).astype(np.float32)
    return name, moved, {f"{name}.{key}": value for key, value in values.items()}, more


def _llama3_factors(factor: float, head_dim: int, base: float) -> np.ndarray:
    """Returns what each frequency is divided by."""
    low, high, length = _LLAMA3
    frequencies = base ** (-2 * np.arange(head_dim // 2) / max(head_dim, 1))
    kept = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)


def _plain(value: Any) -> Any:
    # Numbers are stored in 32 bits: 1e-5, not 9.999999747378752e-06.
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(options: Options) -> int:
    heads = max(options.integer("num_attention_heads"), 1)
    return options.integer("head_dim", options.integer("hidden_size") // heads)


def _check_variant(own: Options, options: Options) -> None:
    head_dim, context = _head_dim(options), options.integer("max_position_embeddings")
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.integer(key, head_dim) != head_dim:
            raise own.error(key, f"{own.integer(key)} differs from the size of a head, {head_dim}; not supported")
    if own.integer("expert_count", 0):
        raise own.error("expert_count", "mixtures of experts are not supported")
    if own.integer("attention.sliding_window", context) < context:
        raise own.error("attention.sliding_window", "is below the context length; windows are not supported")


def _rotary(own: Options, options: Options, source: WeightSource, names: set[str]) -> dict[str, Any]:
    kind = own.choice("rope.scaling.type", {"none": "default", "linear": "linear"}, "none")
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": own.number("rope.scaling.factor")}}
    if _FACTORS not in names:
        return {}
    low, high, length = _LLAMA3
    head_dim, base = _head_dim(options), options.number("rope_theta", 10_000.0)
    # The size first: one that the file merely claims may be more than memory holds.
    fits = source.shape(_FACTORS) == (head_dim // 2,)
    if fits:
        stored = source.read(_FACTORS).astype(np.float64)
        factor = float(stored.max(initial=1.0))
        with np.errstate(all="ignore"):  # absurd numbers fit nothing
            fits = np.allclose(stored, _llama3_factors(factor, head_dim, base), rtol=1e-3)
    if not fits:
        raise UserError(f"{source.path}: tensor '{_FACTORS}' is no scaling of Llama 3; other ones are not supported")
    names_of = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_scaling": {"rope_type": "llama3"} | dict(zip(names_of, (factor, low, high, int(length))))}
