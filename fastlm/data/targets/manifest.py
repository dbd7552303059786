"""What cached targets are of, and which files they lie in.

Notable: a row is known by its number in the training stream: row i of global batch s has number s B + i, however many
processes read it. Its targets belong to one teacher, one way to sample and one stream, so all that decides these is
written beside them (`manifest.json`) and compared before anything is read. Targets are cut into files by steps, so that
writers share them out and a stopped one goes on with the next file, and where processes that each have a part of
every batch write, by slices of the batch too. Files are always whole, the last one included, so more steps may be
added at any time.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.data.directory import create_once
from fastlm.data.documents import digest
from fastlm.errors import UserError
from fastlm.ops import sparse_targets
from fastlm.ops.sparse_targets import Method

FILE = "manifest.json"
_FORMAT = "targets 1"


@dataclasses.dataclass(frozen=True)
class Key:
    """What targets are of: others are of no use.

    Attributes:
      teacher: fingerprint of its architecture and weights.
      tokenizer: fingerprint.
      vocab_size: V, of the teacher's logits.
      method: spec of a `sparse_targets.Method`, "sampled(draws=50)".
      data: `identity` of the batches, with `batch_size`.
      seed: of the draws.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    method: str
    data: dict[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        # With every option, so that a default left out is no difference, and as JSON gives it back.
        object.__setattr__(self, "method", sparse_targets.describe(self.sampler))
        object.__setattr__(self, "data", json.loads(json.dumps(self.data)))
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed of the targets must be at least 0 and below 2**32, got {self.seed}")

    @property
    def sampler(self) -> Method:
        """The method."""
        return sparse_targets.make(self.method)

    @property
    def batch_size(self) -> int:
        """B, rows of a global batch."""
        return self.data["batch_size"]

    @property
    def fingerprint(self) -> str:
        """Of all of it."""
        return digest(json.dumps(dataclasses.asdict(self), sort_keys=True))


@dataclasses.dataclass(frozen=True)
class Part:
    """A file: the rows of one slice of the batches start .. stop - 1, in order."""

    start: int
    stop: int
    slice: int
    rows: int

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.start:08d}-{self.slice:03d}.array_record"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A key, and how the rows are laid out.

    Attributes:
      key: see `Key`.
      view: names of the arrays of a batch that each row's hashes are of.
      steps: batches that there are, or will be: a multiple of `steps_per_file`.
      steps_per_file: batches in a file.
      slices: parts of a batch, each in files of its own.
    """

    key: Key
    view: tuple[str, ...]
    steps: int
    steps_per_file: int
    slices: int

    @property
    def rows_per_slice(self) -> int:
        """Rows of a batch in one file."""
        return self.key.batch_size // self.slices

    def parts(self, steps: int) -> list[Part]:
        """Returns the files that hold the first `steps` batches."""
        starts = range(0, steps, self.steps_per_file)
        return [self.part(start, number) for start in starts for number in range(self.slices)]

    def part(self, step: int, number: int) -> Part:
        """Returns the file with a slice of a batch."""
        start = step - step % self.steps_per_file
        return Part(start, start + self.steps_per_file, number, self.steps_per_file * self.rows_per_slice)

    def place(self, row: int) -> tuple[Part, int]:
        """Returns the file that a row is in, and its number there."""
        step, index = divmod(row, self.key.batch_size)
        number, within = divmod(index, self.rows_per_slice)
        part = self.part(step, number)
        return part, (step - part.start) * self.rows_per_slice + within

    def save(self, folder: Path) -> None:
        """Writes it, unless there is one.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        create_once(folder / FILE, lambda path: path.write_text(self._text))

    def extended(self, folder: Path, steps: int) -> "Manifest":
        """Returns it for at least so many steps, written in place of this one if those are more.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        whole = -(-steps // self.steps_per_file) * self.steps_per_file
        longer = dataclasses.replace(self, steps=max(self.steps, whole))
        if longer != self:
            aside = create_once(folder / f".{FILE}.{uuid.uuid4().hex}", lambda path: path.write_text(longer._text))
            aside.replace(folder / FILE)
        return longer

    @property
    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"format": _FORMAT}, indent=1)


def load(folder: str | os.PathLike[str]) -> Manifest:
    """Reads a folder's manifest.

    Raises:
      UserError: there is none, or none that can be read.
    """
    path = Path(folder) / FILE
    try:
        saved = json.loads(path.read_text())
        found = saved.pop("format")
        if found != _FORMAT:
            raise UserError(f"{folder}: cached targets of format '{found}', this version reads '{_FORMAT}'; write anew")
        return Manifest(**saved | {"key": Key(**saved["key"]), "view": tuple(saved["view"])})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no cached targets there ({FILE} is missing); write them first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the targets anew in another folder") from None


def check_key(folder: str | os.PathLike[str], found: Key, wanted: Key) -> None:
    """Checks that targets are those that are wanted.

    Raises:
      UserError: they are of something else; the message says of what.
    """
    for field in dataclasses.fields(Key):
        if field.name != "data":
            _check_same(folder, field.name, getattr(found, field.name), getattr(wanted, field.name))
    check_data(folder, found, wanted.data)


def check_data(folder: str | os.PathLike[str], found: Key, identity: Mapping[str, Any]) -> None:
    """Checks that targets are of the batches with this identity.

    Raises:
      UserError: they are of others; the message says what differs.
    """
    for name in dict.fromkeys((*found.data, *identity)):
        _check_same(folder, f"data.{name}", found.data.get(name), identity.get(name))


def _check_same(folder: str | os.PathLike[str], name: str, found: Any, here: Any) -> None:
    if found != here:
        raise UserError(
            f"{folder}: the cached targets there are of another {name}: {found}, here it is {here}; set it back, or "
            "write targets anew in another folder"
        )


def check_view(folder: str | os.PathLike[str], found: Sequence[str], here: Sequence[str]) -> None:
    """Checks that batches have the arrays that targets were made of.

    Raises:
      UserError: they have others.
    """
    if tuple(found) != tuple(here):
        raise UserError(
            f"{folder}: the cached targets there are of batches with {', '.join(found)}, these have {', '.join(here)}; "
            "write targets anew in another folder"
        )
