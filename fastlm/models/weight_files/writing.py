"""Writing safetensors, one tensor in memory at a time, in shards where large.

Notable: the header comes from shapes and dtypes alone, so values are asked for only when their turn
comes. Files are written aside, flushed to disk and renamed when all are whole; whatever fails before
leaves what was there. Within a file tensors lie by falling alignment, then by name, which gives the
very bytes of the reference implementation. Weights of an earlier write are replaced as a set, as
a left-over `model.safetensors` would hide the shards beside it.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlm.errors import UserError
from fastlm.models.weight_files.files import quoted
from fastlm.models.weight_files.opening import INDEX, SINGLE_FILE
from fastlm.models.weight_files.safetensors import DTYPES, METADATA
from fastlm.models.weight_files.shapes import array_bytes

_ENCODINGS = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
_ANY_SHARD = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"


class TensorToWrite(NamedTuple):
    """A tensor by name: its values, or a function that makes them, called once, when they are written."""

    name: str
    values: Any
    shape: Sequence[int]
    dtype: Any

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return array_bytes(self.shape, 1, self.dtype.itemsize)


def write_safetensors(
    target: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray | Callable[[], np.ndarray], Sequence[int], np.dtype]],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes tensors to `target` and returns the files made, the one to open first.

    Args:
      target: a name ending in .safetensors makes this one file, of whatever size; else a folder, which
        gets `model.safetensors`, or shards and `model.safetensors.index.json`.
      tensors: `TensorToWrite` or such tuples (name, values, shape, dtype); shards follow their order.
      metadata: strings for the header; {"format": "pt"} by default, without which transformers refuses.
      max_shard_bytes: tensor data per shard; a larger tensor gets a shard of its own.

    Raises:
      UserError: the disk is full or the place cannot be written to (what was there before stays, nothing
        half-written is left), or a tensor has a dtype that safetensors does not know.
      ValueError: a name occurs twice, metadata are not strings, or values are not as announced.
    """
    target = Path(target).expanduser()
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    planned = [_planned(target, tensor) for tensor in tensors]
    if len({tensor.name for tensor in planned} | {METADATA}) != len(planned) + 1:
        raise ValueError(f"{target}: names of tensors must be different, and not {METADATA}")
    if any(not isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError(f"{target}: metadata must be strings by name")
    one_file = target.suffix == ".safetensors" and not target.is_dir()
    shards = {target: planned} if one_file else _named_shards(target, planned, max_shard_bytes)
    with _replacing(target, shards) as aside:
        for final, shard in shards.items():
            _write_file(aside[final], shard, metadata)
        if len(shards) > 1:
            aside[target / INDEX] = _beside(target / INDEX)
            aside[target / INDEX].write_text(_index(shards))
    return sorted(aside, key=lambda final: final.name != INDEX)


def _planned(target: Path, tensor: tuple) -> TensorToWrite:
    name, values, shape, dtype = tensor
    dtype = np.dtype(dtype)
    if dtype not in _ENCODINGS:
        raise UserError(
            f"{target}: tensor {quoted(name)} is {dtype}, which safetensors does not know; convert it to one of "
            f"{', '.join(str(known) for known in _ENCODINGS)}"
        )
    planned = TensorToWrite(name, values, tuple(int(length) for length in shape), dtype)
    if planned.size is None:
        raise ValueError(f"{target}: tensor {quoted(name)} has the impossible shape {shape}")
    return planned


def _named_shards(folder: Path, tensors: list[TensorToWrite], limit: int) -> dict[Path, list[TensorToWrite]]:
    """Splits tensors, in their order, into files of at most `limit` bytes of data each."""
    shards: list[list[TensorToWrite]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.size
    if len(shards) == 1:
        return {folder / SINGLE_FILE: tensors}
    return {
        folder / _SHARD.format(number=number, count=len(shards)): shard for number, shard in enumerate(shards, start=1)
    }


def _index(shards: Mapping[Path, list[TensorToWrite]]) -> str:
    sizes = [tensor.size for shard in shards.values() for tensor in shard]
    weight_map = {tensor.name: final.name for final, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _write_file(path: Path, tensors: list[TensorToWrite], metadata: Mapping[str, str]) -> None:
    tensors = sorted(tensors, key=lambda tensor: (-_ALIGNMENT_RANK[tensor.dtype], tensor.name))
    with path.open("xb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            file.write(_content(tensor))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: list[TensorToWrite], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _ENCODINGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: TensorToWrite) -> memoryview:
    values = np.asarray(tensor.values() if callable(tensor.values) else tensor.values)
    if values.shape != tensor.shape or values.dtype != tensor.dtype:
        raise ValueError(
            f"tensor {quoted(tensor.name)} was announced as {tensor.dtype}{list(tensor.shape)}, "
            f"but its values are {values.dtype}{list(values.shape)}"
        )
    # Through bytes, since numpy gives no buffer of bfloat16.
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _replacing(target: Path, finals: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Gives a place beside each final path (more may be added) and renames all to their ends at the end."""
    aside = {final: _beside(final) for final in finals}
    try:
        next(iter(aside)).parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _publish(target, aside)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; free space or name another place") from None
    finally:
        for path in aside.values():
            with contextlib.suppress(OSError):
                path.unlink()


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}")


def _publish(target: Path, aside: Mapping[Path, Path]) -> None:
    """Renames the files, the index last, such that no moment shows a mixture of old and new weights."""
    old = [] if target in aside else [target / SINGLE_FILE, target / INDEX, *target.glob(_ANY_SHARD)]
    if len(aside) > 1:
        for entry in old[:2]:  # without them the folder holds no weights for as long as the renames take
            entry.unlink(missing_ok=True)
    for final, path in aside.items():
        path.replace(final)
    for path in set(old) - set(aside):
        path.unlink(missing_ok=True)
