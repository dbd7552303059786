"""BERT (arXiv 1810.04805), RoBERTa (1907.11692) and DistilBERT (1910.01108): tables and configs.

Notable: a sentence encoder of sentence-transformers is a BertModel; that it takes the mean over tokens
stands in files beside it, not in config.json. RoBERTa counts positions from the padding id + 1.
Left out: BERT as a decoder, relative positions, untied vocabularies, next-sentence prediction.
"""

from typing import Any

from fastlm.errors import UserError
from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.tables import Architecture, Head, Row, dense, norm, projection

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of several names for one function, the first.
ACTIVATION_NAMES = {kind: name for name, kind in reversed(ACTIVATIONS.items())}
POOLER = "pooler.dense"
# What all of these are; `layer_norm` with biases is BERT's only norm.
_ENCODER = {
    "family": "encoder",
    "norm": "layer_norm",
    "norm_place": "post",
    "positions": "learned",
    "embedding_norm": True,
    "bias": True,
    "residual_init": "same",
}
_MASKED = {"head_bias": True, "pooler": ""}
_NO_POOLER = {"pooler": ""}


def _transform(theirs: str, norm_name: str) -> tuple[Row, ...]:
    """Rows of the layer before the vocabulary."""
    return (*projection("head/transform", theirs), *norm("head/norm", norm_name))


def _embedding(copy: str) -> tuple[Row, ...]:
    return (
        Row("embedding/table", "embeddings.word_embeddings.weight", copies=(copy,)),
        Row("embedding/positions", "embeddings.position_embeddings.weight"),
        Row("embedding/token_types", "embeddings.token_type_embeddings.weight"),
        *norm("embedding/norm", "embeddings.LayerNorm"),
    )


_LAYER = (
    *projection("layers/{i}/attention/q", "encoder.layer.{i}.attention.self.query"),
    *projection("layers/{i}/attention/k", "encoder.layer.{i}.attention.self.key"),
    *projection("layers/{i}/attention/v", "encoder.layer.{i}.attention.self.value"),
    *projection("layers/{i}/attention/out", "encoder.layer.{i}.attention.output.dense"),
    *norm("layers/{i}/attention_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *projection("layers/{i}/feed_forward/up", "encoder.layer.{i}.intermediate.dense"),
    *projection("layers/{i}/feed_forward/down", "encoder.layer.{i}.output.dense"),
    *norm("layers/{i}/feed_forward_norm", "encoder.layer.{i}.output.LayerNorm"),
)
_BERT_MASKED = Head(
    "masked_language_model",
    (
        *_transform("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        Row("head/bias", "cls.predictions.bias", copies=("cls.predictions.decoder.bias",)),
    ),
    _MASKED,
)
_ROBERTA_MASKED = Head(
    "masked_language_model",
    (
        *_transform("lm_head.dense", "lm_head.layer_norm"),
        Row("head/bias", "lm_head.bias", copies=("lm_head.decoder.bias",)),
    ),
    _MASKED,
)
_SPANS = Head("tokens", dense("head", "qa_outputs"), {"classes": 2} | _NO_POOLER)
_TOKENS = Head("tokens", dense("head", "classifier"), _NO_POOLER)


def _fields(options: Options, names: set[str]) -> dict[str, Any]:
    return _ENCODER | {
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("max_position_embeddings", 512),
        "layers": options.integer("num_hidden_layers"),
        "width": options.integer("hidden_size"),
        "heads": options.integer("num_attention_heads"),
        "feed_forward": _activation(options, "hidden_act", names),
        "feed_forward_width": options.integer("intermediate_size"),
        "norm_epsilon": options.number("layer_norm_eps", 1e-12),
        "token_types": _token_types(options),
        "pooler": "tanh" if f"{POOLER}.weight" in names else "",
        "dropout": options.number("hidden_dropout_prob", 0.1),
        "init_scale": options.number("initializer_range", 0.02),
    }


def _token_types(options: Options) -> int:
    count = options.integer("type_vocab_size", 2)
    if not count:
        raise options.error("type_vocab_size", "must be at least 1")
    return count


def _activation(options: Options, key: str, names: set[str]) -> str:
    kind = options.choice(key, ACTIVATIONS, "gelu")
    # The transform before the vocabulary has the same function there, and always the exact gelu here.
    masked = {"cls.predictions.transform.dense.weight", "vocab_transform.weight"}
    if kind != "gelu_exact" and masked & names:
        raise options.error(key, f"'{options.values[key]}' with a masked language model head is not supported")
    return kind


def _options(cfg: ModelConfig) -> dict[str, Any]:
    layer = cfg.layer(0)
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.width,
        "num_attention_heads": layer.heads,
        "hidden_act": ACTIVATION_NAMES.get(layer.feed_forward),
        "intermediate_size": layer.feed_forward_width,
        "layer_norm_eps": cfg.norm_epsilon,
        "type_vocab_size": cfg.token_types,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.dropout,
        "initializer_range": cfg.init_scale,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


_ACCEPTED = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (),
}

BERT = Architecture(
    model_type="bert",
    prefix="bert.",
    rows=(*_embedding("cls.predictions.decoder.weight"), *_LAYER),
    heads={
        "BertModel": Head("none", dense("pooler", POOLER), prefixed=False),
        "BertForMaskedLM": _BERT_MASKED,
        "BertForSequenceClassification": Head(
            "sequence", (*dense("pooler", f"bert.{POOLER}"), *dense("head", "classifier")), {"pooler": "tanh"}
        ),
        "BertForQuestionAnswering": _SPANS,
        "BertForTokenClassification": _TOKENS,
    },
    fields=_fields,
    options=_options,
    accepted=_ACCEPTED,
    ignored=(r"embeddings\.position_ids", r"cls\.seq_relationship\.(weight|bias)"),
    read_as={"BertForPreTraining": "BertForMaskedLM"},
    renamed={".gamma": ".weight", ".beta": ".bias"},
)


def _roberta_fields(options: Options, names: set[str]) -> dict[str, Any]:
    fields, offset = _fields(options, names), options.integer("pad_token_id", 1) + 1
    if fields["max_length"] <= offset:
        raise UserError(f"{options.where}: max_position_embeddings {fields['max_length']} leaves no room for a text")
    return fields | {"position_offset": offset, "max_length": fields["max_length"] - offset}


def _roberta_options(cfg: ModelConfig) -> dict[str, Any]:
    offset = cfg.position_offset
    return _options(cfg) | {"max_position_embeddings": cfg.max_length + offset, "pad_token_id": max(offset - 1, 0)}


ROBERTA = Architecture(
    model_type="roberta",
    prefix="roberta.",
    rows=(*_embedding("lm_head.decoder.weight"), *_LAYER),
    heads={
        "RobertaModel": Head("none", dense("pooler", POOLER), prefixed=False),
        "RobertaForMaskedLM": _ROBERTA_MASKED,
        "RobertaForSequenceClassification": Head(
            "sequence",
            (*dense("pooler", "classifier.dense"), *dense("head", "classifier.out_proj")),
            {"pooler": "tanh"},
        ),
        "RobertaForQuestionAnswering": _SPANS,
        "RobertaForTokenClassification": _TOKENS,
    },
    fields=_roberta_fields,
    options=_roberta_options,
    accepted=_ACCEPTED,
    ignored=(r"embeddings\.position_ids",),
)


def _distilbert_fields(options: Options, names: set[str]) -> dict[str, Any]:
    return _ENCODER | {
        "vocab_size": options.integer("vocab_size"),
        "max_length": options.integer("max_position_embeddings", 512),
        "layers": options.integer("n_layers"),
        "width": options.integer("dim"),
        "heads": options.integer("n_heads"),
        "feed_forward": _activation(options, "activation", names),
        "feed_forward_width": options.integer("hidden_dim"),
        "norm_epsilon": 1e-12,
        "dropout": options.number("dropout", 0.1),
        "init_scale": options.number("initializer_range", 0.02),
    }


def _distilbert_options(cfg: ModelConfig) -> dict[str, Any]:
    layer = cfg.layer(0)
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "n_layers": cfg.layers,
        "dim": cfg.width,
        "n_heads": layer.heads,
        "activation": ACTIVATION_NAMES.get(layer.feed_forward),
        "hidden_dim": layer.feed_forward_width,
        "dropout": cfg.dropout,
        "attention_dropout": cfg.dropout,
        "initializer_range": cfg.init_scale,
        "tie_word_embeddings": True,
    }


DISTILBERT = Architecture(
    model_type="distilbert",
    prefix="distilbert.",
    rows=(
        Row("embedding/table", "embeddings.word_embeddings.weight", copies=("vocab_projector.weight",)),
        Row("embedding/positions", "embeddings.position_embeddings.weight"),
        *norm("embedding/norm", "embeddings.LayerNorm"),
        *projection("layers/{i}/attention/q", "transformer.layer.{i}.attention.q_lin"),
        *projection("layers/{i}/attention/k", "transformer.layer.{i}.attention.k_lin"),
        *projection("layers/{i}/attention/v", "transformer.layer.{i}.attention.v_lin"),
        *projection("layers/{i}/attention/out", "transformer.layer.{i}.attention.out_lin"),
        *norm("layers/{i}/attention_norm", "transformer.layer.{i}.sa_layer_norm"),
        *projection("layers/{i}/feed_forward/up", "transformer.layer.{i}.ffn.lin1"),
        *projection("layers/{i}/feed_forward/down", "transformer.layer.{i}.ffn.lin2"),
        *norm("layers/{i}/feed_forward_norm", "transformer.layer.{i}.output_layer_norm"),
    ),
    heads={
        "DistilBertModel": Head("none", prefixed=False),
        "DistilBertForMaskedLM": Head(
            "masked_language_model",
            (*_transform("vocab_transform", "vocab_layer_norm"), Row("head/bias", "vocab_projector.bias")),
            _MASKED,
        ),
        "DistilBertForSequenceClassification": Head(
            "sequence", (*dense("pooler", "pre_classifier"), *dense("head", "classifier")), {"pooler": "relu"}
        ),
        "DistilBertForQuestionAnswering": _SPANS,
        "DistilBertForTokenClassification": _TOKENS,
    },
    fields=_distilbert_fields,
    options=_distilbert_options,
    accepted={"tie_word_embeddings": (True,), "quantization_config": ()},
)
