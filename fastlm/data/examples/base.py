"""`Examples`: a random-access sequence of rows of named fields, with an identity.

Notable: the counterpart of `Documents` for what has more than a text: pairs, labelled examples,
questions with answers. Values are text or numbers, nothing nested; what is nested where it comes from
gets names with slashes (``answers/text``), and of a list the first element. Of a list of several texts, as the
reference answers of a question are, a row keeps all besides, under `every(name)`. Images are texts of numbers
(``0 255 17``), which the tokenizer kind "numbers" reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from fastlm.data.documents import digest

Row = dict[str, str | int | float | tuple[str, ...]]


def every(name: str) -> str:
    """Returns where a row may have all texts of a list, of which its field `name` is the first; no field itself."""
    return f"#every {name}"


class Examples(ABC):
    """A random-access sequence of rows, all with the same fields.

    Attributes:
      name: What a person calls it, as in ``old_testament_en_es/train``.
      fingerprint: Hex digest of its identity: the same rows in the same order on any machine.
      fields: Names of the fields of every row.
    """

    name: str
    fingerprint: str
    fields: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Returns row `index`, 0 <= index < len."""

    def get(self, indices: Sequence[int]) -> list[Row]:
        """Returns several rows; faster than one by one where the source can."""
        return [self[index] for index in indices]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


class Selection(Examples):
    """Some rows of other `Examples`, in the order of `indices`."""

    def __init__(self, base: Examples, indices: Sequence[int], name: str) -> None:
        self._base, self._indices = base, indices
        self.name, self.fields = name, base.fields
        self.fingerprint = digest(base.fingerprint, np.asarray(indices, np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        return self._base[int(self._indices[index])]

    def get(self, indices: Sequence[int]) -> list[Row]:
        """Returns several rows."""
        return self._base.get([int(self._indices[index]) for index in indices])
