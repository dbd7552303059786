"""The tensor types of GGUF that are read, and how their bytes become arrays.

Notable: the sizes of blocks and their arithmetic come from the `gguf` package of the format's authors.
Left out: the types without a test here (IQ*, TQ*, MXFP4, NVFP4).
"""

import functools
from typing import BinaryIO

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fastlm.errors import UserError
from fastlm.models.weight_files.files import damaged, quoted
from fastlm.models.weight_files.gguf_header import TensorInfo
from fastlm.models.weight_files.shapes import array_bytes
from fastlm.models.weight_files.source import StoredTensor

# Types whose bytes are the numbers, with what they are read as: the short floats widen without loss.
_PLAIN = {
    "F32": (np.dtype(np.float32), np.dtype(np.float32)),
    "F16": (np.dtype(np.float16), np.dtype(np.float32)),
    "BF16": (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
    "F64": (np.dtype(np.float64), np.dtype(np.float64)),
    "I8": (np.dtype(np.int8), np.dtype(np.int8)),
    "I16": (np.dtype(np.int16), np.dtype(np.int16)),
    "I32": (np.dtype(np.int32), np.dtype(np.int32)),
    "I64": (np.dtype(np.int64), np.dtype(np.int64)),
}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_KINDS = {GGMLQuantizationType[name].value: GGMLQuantizationType[name] for name in (*_PLAIN, *_BLOCKS)}
_CHUNK_ELEMENTS = 1 << 16  # 256 kB of float32 stay in the cache


def stored_tensor(file: BinaryIO, info: TensorInfo, offset: int) -> StoredTensor:
    """Returns the tensor that lies at byte `offset` of the file.

    Raises:
      UserError: its type is not read, or its shape is impossible for the type.
    """
    if info.kind not in _KINDS:
        raise UserError(
            f"{file.name}: tensor {quoted(info.name)} has the type {_kind_name(info.kind)}, and those read are "
            f"{', '.join((*_PLAIN, *_BLOCKS))}; take a file of the model in one of these"
        )
    kind = _KINDS[info.kind]
    size = array_bytes(info.shape, *GGML_QUANT_SIZES[kind])
    if size is None:
        raise damaged(file.name, f"tensor {quoted(info.name)} has the shape {info.shape}, impossible for {kind.name}")
    if kind.name in _PLAIN:
        stored, dtype = _PLAIN[kind.name]
        decode = functools.partial(_decode_plain, shape=info.shape, stored=stored, dtype=dtype)
    else:
        dtype = np.dtype(np.float32)
        decode = functools.partial(_decode_blocks, shape=info.shape, kind=kind)
    return StoredTensor(file, offset, size, info.shape, dtype, kind.name, decode)


def _kind_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"


def _decode_plain(content: np.ndarray, shape: tuple[int, ...], stored: np.dtype, dtype: np.dtype) -> np.ndarray:
    return content.view(stored).astype(dtype, copy=False).reshape(shape)


def _decode_blocks(content: np.ndarray, shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """Dequantizes some blocks at a time: the library works on 16 rows and holds its result twice."""
    values = np.empty(shape, np.float32)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    blocks, stored = values.reshape(-1, block_elements), content.reshape(-1, block_bytes)
    step = _CHUNK_ELEMENTS // block_elements
    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
        for first in range(0, len(stored), step):
            part = stored[first : first + step]
            blocks[first : first + step] = dequantize(part.reshape(1, -1), kind).reshape(-1, block_elements)
    return values
