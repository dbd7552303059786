"""`Documents`: what every source gives, a random-access sequence of texts with an identity.

Notable: splits, and TFDS-like slices of them (``train[:10%]``, ``test[100:200]``), are views that
hold indices, never copies of text; all of it pickles, so that worker processes can have it.
Left out: fields other than the text; rows of several fields (pairs, labelled examples) are
`fastlm.data.examples`.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fastlm.errors import UserError, nearest

SPLITS = ("train", "validation", "test")


class Documents(ABC):
    """A random-access sequence of texts.

    Attributes:
      name: What a person calls it, as in ``state_of_the_union/train``.
      fingerprint: Hex digest of its identity: the same text in the same order on any machine.
      num_bytes: About how many bytes of text it holds; decides whether tokens are cached.
    """

    name: str
    fingerprint: str
    num_bytes: int

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of documents."""

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """Returns the text of document `index`, 0 <= index < len."""

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Selection(Documents):
    """Some documents of another `Documents`, in the order of `indices`."""

    def __init__(self, base: Documents, indices: Sequence[int], name: str) -> None:
        self._base = base
        self._indices = indices
        self.name = name
        self.fingerprint = digest(base.fingerprint, np.asarray(indices, np.int64).tobytes())
        self.num_bytes = base.num_bytes * len(indices) // max(len(base), 1)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> str:
        return self._base[int(self._indices[index])]


def digest(*parts: str | bytes) -> str:
    """Returns 32 hex digits that identify the parts, in order and with their borders."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


_SLICE = re.compile(r"(?P<split>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def parse_split(split: str) -> tuple[str, str, str]:
    """Splits ``train[10%:20%]`` into its name and the two borders (empty where left out).

    Raises:
      UserError: the text is no split.
    """
    match = _SLICE.fullmatch(split.strip())
    if not match:
        raise UserError(f"split '{split}' is not understood: write a name and an optional slice, as in 'train[:10%]'")
    return match["split"], match["start"] or "", match["stop"] or ""


def check_split(split: str, valid: Mapping[str, object] | Sequence[str], source: str) -> None:
    """Raises a `UserError` that lists the valid splits, unless `split` is one of them."""
    if split not in valid:
        raise UserError(
            f"source '{source}' has no split '{split}'{nearest(split, valid)} (it has: {', '.join(sorted(valid))})"
        )


def apply_slice(documents: Documents, start: str, stop: str) -> Documents:
    """Returns the documents between two borders, each empty, a number, or a percentage."""
    if not start and not stop:
        return documents
    return Selection(documents, slice_range(len(documents), start, stop), f"{documents.name}[{start}:{stop}]")


def slice_range(count: int, start: str, stop: str) -> range:
    """Returns which of `count` records lie between two borders, each empty, a number, or a percentage."""
    low, high, _ = slice(_border(start, count), _border(stop, count)).indices(count)
    return range(low, max(low, high))


def _border(text: str, count: int) -> int | None:
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
