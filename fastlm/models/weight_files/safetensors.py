"""Reading safetensors: eight bytes of header length, a JSON header, the tensors back to back.

Format: https://github.com/huggingface/safetensors ("Format"). Notable: own code instead of the
`safetensors` package. That one (0.8) writes only what is all in memory, takes the last of two tensors of
one name, gives numpy no float8, and its errors name neither file nor tensor. As the format demands,
tensors must cover the data without a gap or an overlap: no byte of a file is unaccounted for.

Left out: the types with less than a byte per number (F4, F6).
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from fastlm.errors import UserError
from fastlm.models.weight_files.files import MAX_HEADER_BYTES, damaged, open_file, quoted, read_exactly
from fastlm.models.weight_files.shapes import array_bytes
from fastlm.models.weight_files.source import StoredTensor

METADATA = "__metadata__"
# In ascending order of alignment: the writer puts the largest first, so that every tensor is aligned.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}


def read_safetensors(path: Path, files: contextlib.ExitStack) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of one file by name, in the order of their data, and its metadata.

    Raises:
      UserError: the file is missing, truncated, or its header is not one the format allows.
    """
    file, size = open_file(path, files)
    if size < 8:
        raise damaged(path, f"holds {size} bytes, too few for a safetensors header")
    length = int.from_bytes(read_exactly(file, 8, "the header"), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise damaged(path, f"announces a header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES})")
    text = read_exactly(file, length, "the header")
    if not text.startswith(b"{"):
        raise damaged(path, "the header is not a JSON object")
    header = parse_json_object(text, path, "the header")
    metadata = _checked_metadata(header.pop(METADATA, {}), path)
    tensors = {name: _stored_tensor(file, size, 8 + length, name, entry) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_coverage(tensors, path, 8 + length, size)
    return tensors, metadata


def parse_json_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parses JSON that must be an object without a repeated name at any depth.

    Raises:
      UserError: it is not; `what` names the part of the file in the message.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except _RepeatedNameError as error:
        raise damaged(path, f"{what} has the name {quoted(str(error))} twice") from None
    except (ValueError, RecursionError):  # invalid Unicode and overlong numbers are ValueErrors too
        raise damaged(path, f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise damaged(path, f"{what} is not a JSON object")
    return value


class _RepeatedNameError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedNameError(name)
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # an escaped half of a surrogate pair could never be printed or written
        found[name] = value
    return found


def _checked_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or any(not isinstance(text, str) for text in value.values()):
        raise damaged(path, f"{METADATA} is not an object of strings")
    return value


def _stored_tensor(file: BinaryIO, size: int, start: int, name: str, entry: object) -> StoredTensor:
    """Checks one entry of the header; `start` is where the data begins."""
    label = f"tensor {quoted(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise damaged(file.name, f"{label} lacks dtype, shape or data_offsets")
    encoding, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(encoding, str) or encoding not in DTYPES:
        raise UserError(f"{file.name}: {label} has dtype {quoted(str(encoding))}; those read are {', '.join(DTYPES)}")
    if not _are_lengths(shape) or not _are_lengths(offsets) or len(offsets) != 2:
        raise damaged(file.name, f"{label}: shape and data_offsets must be whole numbers from 0")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise damaged(
            file.name,
            f"{label} lies at bytes {quoted(str(begin))} to {quoted(str(end))} of {size - start} bytes of data",
        )
    dtype = DTYPES[encoding]
    if array_bytes(shape, 1, dtype.itemsize) != end - begin:
        raise damaged(
            file.name, f"{label}: shape {quoted(str(shape))} of {encoding} does not take its {end - begin} bytes"
        )
    decode = functools.partial(_decode, shape=tuple(shape), dtype=dtype)
    return StoredTensor(file, start + begin, end - begin, tuple(shape), dtype, encoding, decode)


def _are_lengths(value: object) -> bool:
    # `type is int`, since true and false are ints to Python.
    return isinstance(value, list) and all(type(length) is int and length >= 0 for length in value)


def _decode(content: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return content.view(dtype).reshape(shape)


def _check_coverage(tensors: dict[str, StoredTensor], path: Path, start: int, size: int) -> None:
    """Checks that the tensors, sorted by position, cover the data exactly once."""
    position = start
    for name, tensor in tensors.items():
        if tensor.offset != position:
            relation = "overlaps" if tensor.offset < position else "leaves unused bytes after"
            raise damaged(path, f"tensor {quoted(name)} {relation} the one before it")
        position += tensor.size
    if position != size:
        raise damaged(path, f"{size - position} bytes after the last tensor belong to none")
