"""A set of named tensors on disk, whatever the file format: names, shapes, dtypes, and one array at a time.

Notable: tensors are read at their position into fresh memory instead of being mapped. A mapped file
that somebody truncates kills the process with SIGBUS, and its pages count as memory of the process on
top of the copy. Open files are kept, so a file replaced on disk meanwhile does not mix in.

Left out: threads (one source is read by one thread; open another for a second).
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from fastlm.errors import UserError, nearest
from fastlm.models.weight_files.files import damaged, quoted


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how its bytes become an array.

    Attributes:
      file: the open file; `offset` and `size` are bytes in it, checked against its length.
      shape: of the array; row-major, as numpy has it.
      dtype: of the array that `decode` returns.
      encoding: the file's own name of how it is stored ("BF16", "Q4_1").
      decode: from `size` bytes (uint8, owned) to the array.
    """

    file: BinaryIO
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype
    encoding: str
    decode: Callable[[np.ndarray], np.ndarray]


class WeightSource:
    """Named tensors of an open weight file or folder; use it in a `with` statement or call `close`.

    Attributes:
      path: what was opened.
      metadata: safetensors: strings by name. GGUF: its key-values, with arrays of numbers as numpy
        arrays and arrays of strings (the tokenizer's) as lists.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, Any],
        files: contextlib.ExitStack,
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._tensors = dict(tensors)
        self._files = files

    def names(self) -> list[str]:
        """Returns the names of all tensors, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the array that `read(name)` gives."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of the array that `read(name)` gives."""
        return self._find(name).dtype

    def encoding(self, name: str) -> str:
        """Returns the format's own name of how the tensor is stored, "BF16" or "Q4_1"."""
        return self._find(name).encoding

    def stored_bytes(self, name: str) -> int:
        """Returns the bytes the tensor takes in the file."""
        return self._find(name).size

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in memory of its own.

        Raises:
          UserError: no such tensor; the file changed or cannot be read; a boolean is neither 0 nor 1.
        """
        tensor = self._find(name)
        content = np.empty(tensor.size, np.uint8)
        try:
            tensor.file.seek(tensor.offset)
            count = tensor.file.readinto(memoryview(content))
        except OSError as error:
            raise damaged(tensor.file.name, f"tensor {quoted(name)} cannot be read ({error.strerror})") from None
        if count != tensor.size:
            raise damaged(tensor.file.name, f"tensor {quoted(name)} is cut off")
        if tensor.dtype == np.bool_ and content.max(initial=0) > 1:
            raise damaged(tensor.file.name, f"tensor {quoted(name)} holds booleans that are neither 0 nor 1")
        return tensor.decode(content)

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {quoted(name)}{nearest(name, self._tensors)}")
        return self._tensors[name]
