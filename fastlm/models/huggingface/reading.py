"""Reading a model of Hugging Face or llama.cpp: a folder, a GGUF file or a name of the hub."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from fastlm.errors import UserError, nearest
from fastlm.models.config import HEADS, ModelConfig
from fastlm.models.huggingface import folders, gguf, gguf_tokenizer
from fastlm.models.huggingface.describing import architecture_of, choose_head, read_model, shapes_of
from fastlm.models.huggingface.hub import locate
from fastlm.models.huggingface.options import Options, read_json
from fastlm.models.huggingface.tables import Architecture, transfers
from fastlm.models.huggingface.tensors import DTYPES, check_computed, match, plain_names, put, read_params
from fastlm.models.transformer import Model
from fastlm.models.weight_files import WeightSource, open_weights
from fastlm.ops import paths

FREE = ("head", "pooler")  # parts that may be made anew


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model as it came.

    Attributes:
      cfg: what it computes.
      params: nested dicts of numpy arrays, without what `missing` names.
      architecture: class name in transformers; "" for a head that has none there.
      generation: special ids (bos_token_id, eos_token_id, pad_token_id, decoder_start_token_id ...).
      tokenizer_files: contents by name, to be written back as they are; `tokenizer_note` says why there are none.
      labels: names of the classes, if the model names them.
      modules: of sentence-transformers behind a body, as `folders.sentence_modules` has them.
      missing: paths of the parameters that the files do not have, for `complete`.
      unused: tensors that this model does not need (another head, buffers).
      license: by its short name, if the files name one.
    """

    cfg: ModelConfig
    params: dict[str, Any]
    architecture: str
    generation: dict[str, int | list[int]]
    tokenizer_files: dict[str, bytes]
    labels: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tokenizer_note: str = ""
    license: str = ""


def read(
    source: str | os.PathLike[str],
    *,
    head: str | None = None,
    classes: int | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    pooling: str | None = None,
    allow_missing: Sequence[str] = (),
) -> Imported:
    """Reads a model, tensor by tensor.

    Args:
      source: a folder with config.json and safetensors, a .gguf file, or a name of the hub.
      head: `ModelConfig.head` to read it with; None is the one its class has.
      classes: of a new head; a head that is there knows its own.
      revision: of a hub name.
      dtype: of the parameters: float32, bfloat16, float16, or "stored".
      max_length: a shorter context than the model's own.
      pooling: first, last or mean; None is what the files say of a body, and the class of a head.
      allow_missing: "head" and "pooler", where the files need not have them; see `Imported.missing`.

    Raises:
      UserError: whatever is wrong with the files, or with what is asked of them.
    """
    wanted = _Wanted(head, classes or 0, dtype, max_length, pooling, tuple(allow_missing))
    path = locate(source, revision)
    with open_weights(path) as weights:
        if path.suffix.lower() == ".gguf":
            return _read_gguf(weights, wanted)
        return _read_folder(path if path.is_dir() else path.parent, weights, wanted)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The choices of `read`, checked."""

    head: str | None
    classes: int
    dtype: str
    max_length: int | None
    pooling: str | None
    allow_missing: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise UserError(
                f"head: unknown '{self.head}'{nearest(self.head, HEADS) or '; one of: ' + ', '.join(HEADS)}"
            )
        if self.dtype not in DTYPES:
            raise UserError(
                f"dtype: unknown '{self.dtype}'{nearest(self.dtype, DTYPES) or '; one of: ' + ', '.join(DTYPES)}"
            )
        for part in self.allow_missing:
            if part not in FREE:
                raise UserError(f"allow_missing: '{part}' cannot be missing, only {', '.join(FREE)}")


def _read_folder(folder: Path, weights: WeightSource, wanted: _Wanted) -> Imported:
    config = folder / folders.CONFIG
    if not config.is_file():
        raise UserError(f"{folder}: no {folders.CONFIG} beside the weights; download the whole folder")
    options = Options(read_json(config), str(config))
    architecture, modules = architecture_of(options), ()
    _, head = choose_head(architecture, options, wanted.head, wanted.classes)
    if head.kind == "none":  # heads have ways of their own
        modules = folders.sentence_modules(folder)
        wanted = dataclasses.replace(wanted, pooling=wanted.pooling or folders.pooling_of(folder))
    files = folders.tokenizer_files(folder)
    return dataclasses.replace(
        _read_tensors(weights, architecture, options, wanted),
        modules=modules,
        generation=folders.generation_ids(folder, options),
        tokenizer_files=files,
        tokenizer_note="" if files else f"{folder}: holds no tokenizer",
        license=folders.license_of(folder),
    )


def _read_gguf(weights: WeightSource, wanted: _Wanted) -> Imported:
    architecture, options = gguf.options_of(weights, weights.metadata)
    files, note = {}, ""
    try:
        files = gguf_tokenizer.rebuilt(weights.metadata, str(weights.path))
    except UserError as error:  # the weights are good without it
        note = str(error)
    return dataclasses.replace(
        _read_tensors(weights, architecture, options, wanted),
        generation=folders.first_ids([options]),
        tokenizer_files=files,
        tokenizer_note=note,
        license=folders.license_name(weights.metadata.get("general.license")),
    )


def _read_tensors(weights: WeightSource, architecture: Architecture, options: Options, wanted: _Wanted) -> Imported:
    class_name, head = choose_head(architecture, options, wanted.head, wanted.classes)
    names, labels = plain_names(architecture, weights), folders.label_names(options)
    stored = _stored_classes(architecture, head.rows, names, weights)
    classes = wanted.classes or stored or len(labels) or options.integer("num_labels", 2)
    lengths = {"max_length": wanted.max_length, "pooling": wanted.pooling}
    cfg = read_model(architecture, head, options, set(names), classes=classes, **lengths)
    if wanted.classes not in (0, cfg.classes):
        raise UserError(
            f"classes: a {class_name or cfg.head} has {cfg.classes}, not {wanted.classes}; name another head"
        )
    moved, unplaced = transfers(architecture, head, cfg, shapes_of(cfg))
    matched, missing, unused = match(architecture, cfg, moved, unplaced, weights, wanted.allow_missing)
    check_computed(architecture, cfg, weights)
    params = read_params(cfg, matched, weights, wanted.dtype)
    classified = cfg.head in ("sequence", "tokens") and not missing
    if classified and cfg.head == "sequence":  # several labels at a time would be read as a choice of one
        options.require({"problem_type": (folders.problem_type(cfg.classes),)})
    labels = labels if classified else ()
    return Imported(cfg, params, class_name, {}, {}, labels, missing=missing, unused=unused)


def _stored_classes(architecture: Architecture, rows, names: Mapping[str, str], weights: WeightSource) -> int:
    """Returns the classes of the head in the file, 0 if it has none."""
    for row in rows:
        name = names.get(architecture.plain(row.theirs))
        if row.ours == "head/kernel" and name is not None:
            shape = weights.shape(name)
            return shape[0] if shape else 0
    return 0


def complete(imported: Imported, rng: Array) -> dict[str, Any]:
    """Returns the parameters with those that were missing made anew, as `Model.init` makes them."""
    fresh = jax.jit(lambda rng: {path: paths.flatten(Model(imported.cfg).init(rng))[path] for path in imported.missing})
    params = jax.tree.map(lambda leaf: leaf, imported.params)  # a copy of the dicts, not of the arrays
    for path, leaf in fresh(rng).items():
        put(params, path, leaf)
    return params
