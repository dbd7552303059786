"""Between config.json and `ModelConfig`, both ways, and which class of which architecture holds a model.

Notable: a model fits a class if describing it for that class and reading the description gives the same
model back. So nothing is lost in silence: what does not fit is named, field by field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastlm.errors import UserError, nearest
from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.bart import BART, MARIAN
from fastlm.models.huggingface.bert import BERT, DISTILBERT, ROBERTA
from fastlm.models.huggingface.gpt2 import GPT2
from fastlm.models.huggingface.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from fastlm.models.huggingface.options import Options
from fastlm.models.huggingface.t5 import T5
from fastlm.models.huggingface.tables import Architecture, Head, transfers
from fastlm.models.transformer import abstract
from fastlm.ops import paths

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (BERT, DISTILBERT, ROBERTA, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, T5, BART, MARIAN)
}
# How a model is trained, not what it computes.
_TRAINING = ("dropout", "init_scale", "residual_init")
# Fields without effect unless another one has one of these values.
_ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "position_offset": ("positions", ("learned",)),
    "rotary_base": ("positions", ("rotary",)),
    "rotary_scaling": ("positions", ("rotary",)),
    "relative_buckets": ("positions", ("relative",)),
    "relative_distance": ("positions", ("relative",)),
    "pooling": ("head", ("sequence",)),
    "classes": ("head", ("sequence", "tokens")),
    "tied_embeddings": ("head", ("language_model", "masked_language_model")),
    "head_bias": ("head", ("language_model", "masked_language_model")),
    "head_scale": ("head", ("language_model", "masked_language_model")),
    "logit_softcap": ("head", ("language_model", "masked_language_model")),
}
_ABSENT = object()
_PER_LAYER = ("heads", "kv_heads", "head_dim", "attention", "feed_forward", "feed_forward_width", "attention_scale")


def architecture_of(options: Options) -> Architecture:
    """Returns the architecture that a config.json names.

    Raises:
      UserError: it is none of `ARCHITECTURES`.
    """
    name = options.values.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = nearest(name, ARCHITECTURES) if isinstance(name, str) else ""
        raise options.error("model_type", f"unknown architecture {name!r:.60}{hint}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def choose_head(architecture: Architecture, options: Options, kind: str | None, classes: int = 0) -> tuple[str, Head]:
    """Returns the class to read a model as: that of the file, unless another head is asked for (0: of any size).

    Raises:
      UserError: the class of the file is not known and no kind is given.
    """
    named = options.values.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    name = name if isinstance(name, str) else next(iter(architecture.heads))
    name = architecture.read_as.get(name, name)
    sized = lambda head: classes in (0, head.fields.get("classes", classes))
    own = architecture.heads.get(name)
    if own is not None and (kind is None or (kind == own.kind and sized(own))):
        return name, own
    if kind is None:
        hint = nearest(name, architecture.heads) or f"; known: {', '.join(architecture.heads)}"
        raise options.error(
            "architectures", f"unknown class {name!r:.60}{hint}, or choose a head to read the body with"
        )
    for name, head in architecture.heads.items():
        if head.kind == kind and sized(head):
            return name, head
    # No class of theirs: a new head on the body, which can be read but not written.
    return "", Head(kind)


def read_model(
    architecture: Architecture,
    head: Head,
    options: Options,
    names: set[str],
    *,
    classes: int = 0,
    max_length: int | None = None,
    pooling: str | None = None,
) -> ModelConfig:
    """Returns the model that the options describe; `names` are the tensors at hand, without prefix.

    Raises:
      UserError: an option is missing, ill-typed, or one that we cannot take.
    """
    options.require(architecture.accepted)
    fields = architecture.fields(options, names)
    if fields["layers"] + fields.get("encoder_layers", 0) > len(names):
        raise UserError(f"{options.where}: describes more layers than there are tensors ({len(names)})")
    fields |= {"head": head.kind, "classes": classes if head.kind in ("sequence", "tokens") else 0} | dict(head.fields)
    for name, needed in (("vocab_size", True), ("classes", head.kind in ("sequence", "tokens"))):
        if needed and not fields[name]:  # in a config of ours it would be filled in, so the model does not mind
            raise UserError(f"{options.where}: describes a model with {name} 0; the file is damaged")
    last = fields["family"] == "decoder" and head.kind in ("sequence", "none")  # the only token that saw the others
    fields["pooling"] = pooling or ("last" if last else "first")
    if fields.get("head_dim") and fields["heads"] and fields["head_dim"] == fields["width"] // fields["heads"]:
        fields["head_dim"] = 0
    window = fields.pop("window", 0)
    if max_length is not None:
        fields["max_length"] = _shortened(fields, max_length, options)
    if 0 < window < fields["max_length"]:
        raise options.error(
            "sliding_window",
            f"{window} is below the context of {fields['max_length']} and windows are not supported; "
            f"read it with max_length {window}",
        )
    try:
        return ModelConfig(**fields)
    except (UserError, ZeroDivisionError) as error:
        raise UserError(f"{options.where}: describes a model that cannot be built ({error})") from None


def _shortened(fields: dict[str, Any], max_length: int, options: Options) -> int:
    if max_length > fields["max_length"] and fields["positions"] != "relative":
        raise UserError(f"{options.where}: max_length {max_length} is above the model's context {fields['max_length']}")
    if fields["positions"] == "learned" and max_length != fields["max_length"]:
        raise UserError(f"{options.where}: max_length cannot change where positions are learned; leave it out")
    return max_length


def shapes_of(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by path."""
    return {path: tuple(leaf.shape) for path, leaf in paths.flatten(abstract(cfg)[0]).items()}


def describe(cfg: ModelConfig, class_name: str | None = None) -> tuple[str, Architecture, dict[str, Any]]:
    """Returns the class that holds a model (the first that fits, unless one is named) and its config.json.

    Raises:
      UserError: an unknown class, or none that fits; the message says what stands in the way.
    """
    cfg = cfg.plain()  # any form of a weight is written as the array it stands for
    known = {name: architecture for architecture in ARCHITECTURES.values() for name in architecture.heads}
    if class_name is not None and class_name not in known:
        raise UserError(f"unknown class '{class_name}'{nearest(class_name, known) or '; known: ' + ', '.join(known)}")
    found: list[tuple[list[str], str]] = []
    for name, architecture in known.items() if class_name is None else [(class_name, known[class_name])]:
        options = architecture.options(cfg) | {"architectures": [name], "model_type": architecture.model_type}
        misses = _misses(cfg, architecture, architecture.heads[name], options)
        if not misses:
            return name, architecture, options
        found.append((misses, name))
    misses, name = min(found, key=lambda miss: len(miss[0]))
    which = class_name or f"any class of transformers (the nearest is {name})"
    raise UserError(f"this model does not fit {which}: {', '.join(misses)}; change that or keep the fastlm checkpoint")


def _misses(cfg: ModelConfig, architecture: Architecture, head: Head, options: Mapping[str, Any]) -> list[str]:
    """Returns the fields of `cfg` that would be lost, or parameters without a place."""
    moved, unplaced = transfers(architecture, head, cfg, shapes_of(cfg))
    names = {architecture.plain(transfer.name) for transfer in moved}
    try:
        back = _resolved(read_model(architecture, head, Options(options, "config.json"), names, classes=cfg.classes))
    except UserError:  # so far from it that not even a model comes out
        back = {}
    lost = []
    for name, value in _resolved(cfg).items():
        if back.get(name, _ABSENT) != value:
            lost.append(f"{name} {value!r:.60}" + (f" (there {back[name]!r:.60})" if back else ""))
    return lost or [f"parameter {path}" for path in unplaced]


def _resolved(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the fields that say what a model computes, such that equal models have equal ones."""
    fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in _TRAINING}
    for name, (other, values) in _ONLY_WITH.items():
        if getattr(cfg, other) not in values:
            fields[name] = None
    for name in _PER_LAYER:
        fields[name] = [getattr(cfg.layer(i), name) for i in range(cfg.total_layers)]
    fields["qkv_bias"] = cfg.bias or cfg.qkv_bias
    return fields
