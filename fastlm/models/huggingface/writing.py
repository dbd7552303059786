"""Writing a folder that transformers loads: config.json, safetensors, tokenizer files, generation_config.json.

Notable: weights first, config.json last, each whole or not at all, so a folder with a config.json is
complete. Tensors are made one at a time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import UserError, nearest
from fastlm.models import formats
from fastlm.models.config import ModelConfig
from fastlm.models.huggingface import folders
from fastlm.models.huggingface.describing import describe, shapes_of
from fastlm.models.huggingface.tables import transfers
from fastlm.models.huggingface.tensors import DTYPES, tensors_to_write
from fastlm.models.weight_files import write_safetensors
from fastlm.ops import paths


def write(
    folder: str | os.PathLike[str],
    cfg: ModelConfig,
    params: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes] | None = None,
    *,
    architecture: str | None = None,
    generation: Mapping[str, int | list[int]] | None = None,
    labels: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> tuple[str, list[Path]]:
    """Writes a model for transformers.

    Args:
      params: all parameters of `cfg`, numpy or JAX arrays.
      tokenizer_files: contents by name.
      architecture: class name; None takes the first that holds the model.
      generation: special ids, as in `Imported.generation`.
      labels: names of the classes of a classifier.
      modules: of sentence-transformers behind a body, as in `Imported.modules`.
      dtype: of the stored tensors; None keeps that of the parameters.
      max_shard_bytes: size above which weights are split over files.

    Returns:
      (class name, the files written).

    Raises:
      UserError: no class of transformers holds such a model, or the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    if dtype is not None and DTYPES.get(dtype) is None:
        valid = [name for name, kind in DTYPES.items() if kind is not None]
        raise UserError(f"dtype: unknown '{dtype}'{nearest(dtype, valid) or '; one of: ' + ', '.join(valid)}")
    cfg, params = cfg.plain(), formats.merged(params)
    class_name, known, options = describe(cfg, architecture)
    shapes = shapes_of(cfg)
    _check_params(params, shapes)
    moved, _ = transfers(known, known.heads[class_name], cfg, shapes)
    tensors = list(tensors_to_write(cfg, params, moved, dtype))
    options["dtype"] = options["torch_dtype"] = tensors[0].dtype.name
    if cfg.head in ("sequence", "tokens"):
        options |= folders.described_labels(labels, cfg.classes)
    if cfg.head == "sequence":  # without it, pipelines of transformers squash an estimate into [0, 1]
        options["problem_type"] = folders.problem_type(cfg.classes)
    ids = {key: value for key, value in (generation or {}).items() if key in folders.GENERATION_IDS}
    # Explicit nulls, or transformers takes defaults that may lie beyond the vocabulary. Options of the architecture
    # win: RoBERTa counts its positions from the padding id.
    options = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | ids | options
    files = {name: content for name, content in (tokenizer_files or {}).items() if name in folders.TOKENIZER_FILES}
    if cfg.head == "none" and (modules or cfg.pooling != "first"):
        beside = folders.sentence_files(modules, cfg.pooling, cfg.width)
        files |= {name: text.encode() for name, text in beside.items()}
    if cfg.head == "language_model":
        files[folders.GENERATION] = json.dumps(ids, indent=2, sort_keys=True).encode()
    files[folders.CONFIG] = (json.dumps(options, indent=2, sort_keys=True) + "\n").encode()
    written = write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    return class_name, written + [_write(folder / name, content) for name, content in files.items()]


def _check_params(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params).items()}
    wrong = [path for path in {**shapes, **found} if found.get(path) != shapes.get(path)]
    if wrong:
        path = wrong[0]
        raise UserError(
            f"parameter {path}: has shape {found.get(path)}, and the model config asks for {shapes.get(path)} "
            f"({len(wrong)} such); they do not belong together"
        )


def _write(path: Path, content: bytes) -> Path:
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror}); check space and permissions") from None
    return path
