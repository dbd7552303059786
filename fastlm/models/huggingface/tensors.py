"""Moving tensors by a table: what is there is checked whole before any value is read.

Notable: one tensor of theirs is in memory beside the parameters made so far. Tensors with copies come
first, while there is little else. Missing, left-over and ill-shaped tensors are one line each.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from fastlm.errors import UserError, nearest
from fastlm.models.config import ModelConfig
from fastlm.models.huggingface.tables import Architecture, Transfer
from fastlm.models.transformer import abstract
from fastlm.models.weight_files import TensorToWrite, WeightSource
from fastlm.ops import paths

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "stored": None,
}
_FLOATS = (np.dtype(np.float64), *(dtype for dtype in DTYPES.values() if dtype is not None))
_SHOWN = 5
_TOLERANCE = 1e-5  # of what a file stores in float32 and we compute


def plain_names(architecture: Architecture, source: WeightSource) -> dict[str, str]:
    """Returns the names in a file as the tables have them -> as in the file.

    Raises:
      UserError: two names mean the same.
    """
    found: dict[str, str] = {}
    for name in source.names():
        plain = architecture.plain(name)
        if plain in found:
            raise UserError(
                f"{source.path}: tensors '{found[plain]}' and '{name}' are the same one; remove one of them"
            )
        found[plain] = name
    return found


def match(
    architecture: Architecture,
    cfg: ModelConfig,
    moved: Sequence[Transfer],
    unplaced: Sequence[str],
    source: WeightSource,
    allow_missing: Sequence[str],
) -> tuple[list[tuple[Transfer, str, list[str]]], tuple[str, ...], tuple[str, ...]]:
    """Pairs transfers with the tensors of a file, checking that nothing is missing, left over or of another shape.

    Args:
      moved, unplaced: what `tables.transfers` returned.
      allow_missing: beginnings of paths ("head", "pooler") that the file need not have.

    Returns:
      (transfers with the name to read and the names of its copies, our paths that stay unfilled, names unused).

    Raises:
      UserError: as said; the message lists what it is about.
    """
    names, optional = plain_names(architecture, source), architecture.optional_names(cfg)
    # A copy of the table may be a head of its own in another model; without a vocabulary head it is none of ours.
    elsewhere = set() if cfg.head in ("language_model", "masked_language_model") else optional
    own = {architecture.plain(transfer.name) for transfer in moved}
    matched, missing, used, replaced = [], list(unplaced), set(own), []
    for transfer in moved:
        copies = [architecture.plain(copy) for copy in transfer.copies]
        aliases = [architecture.plain(transfer.name), *(copy for copy in copies if copy not in own | elsewhere)]
        present = [names[alias] for alias in aliases if alias in names]
        used.update(aliases)
        free = all(path.split("/")[0] in allow_missing for path in transfer.paths)
        if present and free and source.shape(present[0]) != transfer.shape:
            missing += transfer.paths  # a head of another size than the one asked for
            replaced += present
        elif present:
            matched.append((transfer, present[0], present[1:]))
            _check_tensor(transfer, present[0], source)
        else:
            missing += transfer.paths
    _check_missing(missing, moved, names, source, allow_missing)
    rest = [plain for plain in names if plain not in used and not _ignored(architecture, plain)]
    left_over = [names[plain] for plain in rest if plain not in optional]
    if left_over:
        raise UserError(
            f"{source.path}: {_listed(left_over)} belong to nothing in a {architecture.model_type} model of this "
            "description; they do not go together, or the model has parts that are not supported"
        )
    return matched, tuple(missing), (*replaced, *(names[plain] for plain in rest))


def _check_tensor(transfer: Transfer, name: str, source: WeightSource) -> None:
    if source.shape(name) != transfer.shape:
        raise UserError(
            f"{source.path}: tensor '{name}' has shape {source.shape(name)}, and the description asks for "
            f"{transfer.shape}; they do not go together"
        )
    if source.dtype(name) not in _FLOATS:
        raise UserError(
            f"{source.path}: tensor '{name}' holds {source.dtype(name)}; quantized weights are read from GGUF only: "
            "take the unquantized model"
        )


def _check_missing(
    missing: list[str],
    moved: Sequence[Transfer],
    names: Mapping[str, str],
    source: WeightSource,
    allowed: Sequence[str],
) -> None:
    wanted = {path: transfer.name for transfer in moved for path in transfer.paths}
    lost = [path for path in missing if path.split("/")[0] not in allowed]
    if not lost:
        return
    unknown = list(dict.fromkeys(wanted[path] for path in lost if path in wanted))
    if all(path.split("/")[0] in ("head", "pooler") for path in lost):
        raise UserError(
            f"{source.path}: has no weights for the head asked for ({_listed(unknown or lost)}); choose a head that "
            f"it has, or allow {', '.join(sorted({path.split('/')[0] for path in lost}))} to be missing and train it"
        )
    raise UserError(f"{source.path}: lacks {_listed(unknown or lost)}{nearest((unknown or lost)[0], names.values())}")


def _ignored(architecture: Architecture, plain: str) -> bool:
    return plain in architecture.computed or any(re.fullmatch(pattern, plain) for pattern in architecture.ignored)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    count = f"{len(names)} tensor{'s' * (len(names) != 1)}"
    return f"{count}: {shown}{' ...' if len(names) > _SHOWN else ''}"


def read_params(
    cfg: ModelConfig, matched: Iterable[tuple[Transfer, str, list[str]]], source: WeightSource, dtype: str
) -> dict[str, Any]:
    """Reads tensors into a parameter tree of numpy arrays.

    Raises:
      UserError: a copy differs from its original, or the file cannot be read.
    """
    params: dict[str, Any] = {}
    for transfer, name, copies in sorted(matched, key=lambda item: not item[2]):
        tensor = source.read(name)
        for copy in copies:
            if not _same(tensor, source.read(copy)):
                raise UserError(
                    f"{source.path}: tensor '{copy}' should be a copy of '{name}' and differs; the model is not tied "
                    "as its description says"
                )
        layer = None if transfer.layer is None else cfg.layer(transfer.layer)
        for path, part in zip(transfer.paths, transfer.how.read(tensor, transfer.shapes, layer)):
            put(params, path, np.ascontiguousarray(part, DTYPES[dtype] or part.dtype))
    _add_empty(params, abstract(cfg)[0])
    return params


def check_computed(architecture: Architecture, cfg: ModelConfig, source: WeightSource) -> None:
    """Checks tensors whose values we compute instead of reading.

    Raises:
      UserError: the file holds something else.
    """
    for plain, name in plain_names(architecture, source).items():
        if plain in architecture.computed:
            expected = architecture.computed[plain](cfg)
            stored = source.read(name) if source.shape(name)[1:] == expected.shape[1:] else None
            rows = 0 if stored is None else min(len(stored), len(expected))
            if not rows or not np.allclose(stored[:rows].astype(np.float64), expected[:rows], atol=_TOLERANCE, rtol=0):
                raise UserError(
                    f"{source.path}: tensor '{name}' is not what this architecture computes there; not supported"
                )


def _add_empty(params: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """Adds dicts that have no leaf in any case, such as the encoder of a Marian beside its layers."""
    for key, child in tree.items():
        if isinstance(child, Mapping) and (key in params or not jax.tree.leaves(child)):
            _add_empty(params.setdefault(key, {}), child)


def put(params: dict[str, Any], path: str, leaf: Any) -> None:
    """Sets the leaf of a tree of dicts."""
    *parents, last = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[last] = leaf


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def tensors_to_write(
    cfg: ModelConfig, params: Mapping[str, Any], moved: Iterable[Transfer], dtype: str | None
) -> Iterator[TensorToWrite]:
    """Yields their tensors, whose values are made when their turn comes; `dtype` None keeps that of the parameters."""
    leaves = paths.flatten(params)
    for transfer in moved:
        ours = [leaves[path] for path in transfer.paths]
        stored = DTYPES[dtype] if dtype else np.dtype(ours[0].dtype)

        layer = None if transfer.layer is None else cfg.layer(transfer.layer)

        def values(ours=ours, transfer=transfer, stored=stored, layer=layer) -> np.ndarray:
            return transfer.how.write([np.asarray(leaf) for leaf in ours], layer).astype(stored, copy=False)

        yield TensorToWrite(transfer.name, values, transfer.shape, stored)
