"""Reading GGUF, the format of llama.cpp: key-values (with the tokenizer), tensor infos, aligned data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Notable: every
length is held against what is left of the file before anything is read or made. That is why the
header is parsed here, though the `gguf` package of the format's authors has a reader: on a hostile
count that one loops and fills the memory. Its block types and their dequantization are used.

Left out: big-endian files; models split over several files.
"""

import contextlib
from pathlib import Path
from typing import Any, BinaryIO

from fastlm.errors import UserError
from fastlm.models.weight_files.files import damaged, open_file, quoted
from fastlm.models.weight_files.gguf_header import Header, TensorInfo
from fastlm.models.weight_files.gguf_types import stored_tensor
from fastlm.models.weight_files.source import StoredTensor

# The least bytes that a tensor info and a key-value take.
_INFO_BYTES, _KEY_VALUE_BYTES = 24, 13


def read_gguf(path: Path, files: contextlib.ExitStack) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Returns the tensors of a GGUF file by name, in the order of its header, and its key-values.

    Block-quantized and 16-bit tensors read as float32. Shapes are row-major, the reverse of the file's.

    Raises:
      UserError: the file is missing, truncated, or its header is not one the format allows.
    """
    file, size = open_file(path, files)
    header = Header(file, size)
    header.check_version()
    tensor_count = header.count("tensors", _INFO_BYTES)
    metadata = _key_values(header, path)
    infos = [header.tensor_info() for _ in range(tensor_count)]
    alignment = _alignment(metadata, path)
    start = -(-header.position // alignment) * alignment
    return _placed(infos, file, size, start, alignment), metadata


def _key_values(header: Header, path: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(header.count("key-values", _KEY_VALUE_BYTES)):
        key = header.text("a key")
        if key in metadata:
            raise damaged(path, f"has the key {quoted(key)} twice")
        metadata[key] = header.value(key)
    parts = metadata.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise UserError(f"{path}: is one part of a split model; merge the parts with 'llama-gguf-split --merge'")
    return metadata


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {quoted(str(alignment))}, not a power of two")
    return alignment


def _placed(infos: list[TensorInfo], file: BinaryIO, size: int, start: int, alignment: int) -> dict[str, StoredTensor]:
    """Checks that every tensor lies within the file, aligned, under a name and in bytes of its own."""
    tensors: dict[str, StoredTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise damaged(file.name, f"tensor {quoted(info.name)} is there twice")
        if info.offset % alignment:
            raise damaged(file.name, f"tensor {quoted(info.name)} starts at no multiple of {alignment}")
        tensor = stored_tensor(file, info, start + info.offset)
        if tensor.offset + tensor.size > size:
            raise damaged(file.name, f"tensor {quoted(info.name)} goes beyond the end of the file")
        tensors[info.name] = tensor
    _check_apart(tensors, file)
    return tensors


def _check_apart(tensors: dict[str, StoredTensor], file: BinaryIO) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset < end:
            raise damaged(file.name, f"tensor {quoted(name)} overlaps the one before it")
        end = tensor.offset + tensor.size
