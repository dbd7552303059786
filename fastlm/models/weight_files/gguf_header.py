"""The header of a GGUF file, read piece by piece.

Notable: `Header.require` is the guard of it all: nothing is read, counted through or made before the
bytes it stands for are known to be there. Numbers in arrays become numpy arrays, so a value takes no
more memory than in the file; the strings of a tokenizer take a few times more.

Left out: arrays of arrays, which llama.cpp refuses too.
"""

import struct
from typing import BinaryIO, NamedTuple

import numpy as np

from fastlm.errors import UserError
from fastlm.models.weight_files.files import MAX_HEADER_BYTES, damaged, quoted, read_exactly

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # of llama.cpp
_NUMBERS = {  # the format's value types
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype(np.bool_),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """What the header says of a tensor, unchecked: `kind` is a type number, `offset` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header:
    """A position in the header that never passes the end of the file or the limit on headers."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.position = 0
        self._file = file
        self._end = min(size, MAX_HEADER_BYTES)

    def require(self, count: int, what: str) -> None:
        """Raises UserError unless `count` more bytes are there."""
        if count > self._end - self.position:
            limit = f"the limit of {MAX_HEADER_BYTES} bytes" if self._end == MAX_HEADER_BYTES else "the end of the file"
            raise damaged(self._file.name, f"{what} ({count} bytes) goes beyond {limit}")

    def count(self, what: str, least_bytes: int) -> int:
        """Reads how many entries follow, each of which takes at least so many bytes."""
        count = self._number("Q", f"the number of {what}")
        self.require(count * least_bytes, f"a list of {count} {what}")
        return count

    def text(self, what: str) -> str:
        """Reads a string; `what` names it in errors."""
        content = self._take(self._number("Q", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise damaged(self._file.name, f"{what} is not valid UTF-8") from None

    def check_version(self) -> None:
        """Reads the first two words and raises UserError unless they announce a GGUF file we read."""
        if self._take(4, "the first word") != b"GGUF":
            raise damaged(self._file.name, "is not a GGUF file by its first bytes")
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
            raise UserError(
                f"{self._file.name}: is {kind} GGUF, and little-endian versions 2 and 3 are read; "
                "convert the model again with a current llama.cpp"
            )

    def value(self, key: str) -> bool | int | float | str | np.ndarray | list[str]:
        """Reads the value of a key."""
        what = f"the value of {quoted(key)}"
        kind = self._number("I", what)
        if kind == _STRING:
            return self.text(what)
        if kind in _NUMBERS:
            return self._numbers(kind, 1, what)[0].item()
        if kind == _ARRAY:
            return self._array(what)
        raise damaged(self._file.name, f"{what} has the unknown type {kind}")

    def tensor_info(self) -> TensorInfo:
        """Reads what is said of one tensor; its shape is turned to row-major."""
        name = self.text("the name of a tensor")
        what = f"tensor {quoted(name)}"
        dimensions = self._number("I", what)
        if dimensions > _MAX_DIMENSIONS:
            raise damaged(self._file.name, f"{what} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
        shape = [self._number("Q", what) for _ in range(dimensions)]
        return TensorInfo(name, tuple(reversed(shape)), self._number("I", what), self._number("Q", what))

    def _array(self, what: str) -> np.ndarray | list[str]:
        kind = self._number("I", what)
        if kind == _STRING:
            count = self.count(f"strings in {what}", 8)
            return [self.text(f"string {i} of {what}") for i in range(count)]
        if kind in _NUMBERS:
            return self._numbers(kind, self._number("Q", what), what)
        raise damaged(self._file.name, f"{what} is an array of type {kind}, which is unknown or an array again")

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = _NUMBERS[kind]
        content = self._take(count * dtype.itemsize, what)
        return np.frombuffer(content, np.uint8) != 0 if dtype == np.bool_ else np.frombuffer(content, dtype)

    def _number(self, kind: str, what: str) -> int:
        return struct.unpack("<" + kind, self._take(struct.calcsize("<" + kind), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        self.position += count
        return read_exactly(self._file, count, what)
