"""The user's own text files: one document per file.

Notable: splits are by a hash of the path below the glob's fixed part, about 5% test and 5%
validation, so adding a file moves no other file. With fewer than 20 files that would leave splits
empty, so each file is cut instead: the first 90% for train, then 5% and 5%, at line borders.
`.gz`, `.bz2` and `.xz` are read through.
"""

import bz2
import contextlib
import errno
import glob
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastlm.data.directory import create_once
from fastlm.data.documents import SPLITS, Documents, check_split, digest
from fastlm.errors import UserError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_FEW_FILES = 20
# Beyond this many bytes of files, identity is sizes and ends rather than every byte.
_HASHED_WHOLE = 1 << 30
_ENDS = 1 << 16


class _Span(NamedTuple):
    path: Path
    start: int
    stop: int


class TextFiles(Documents):
    """Documents that are files, or byte ranges of files."""

    def __init__(self, pattern: str, split: str) -> None:
        """Opens the files that `pattern` matches (``**`` goes into folders).

        Raises:
          UserError: nothing matches, everything is empty, or no such split.
        """
        self.name = f"text:{pattern}/{split}"
        check_split(split, (*SPLITS, "all"), f"text:{pattern}")
        root, paths = matching_files(pattern, "text")
        # A file's text is read when asked for; only sizes are read here.
        spans = [_Span(path, 0, _size(path)) for path in paths]
        spans = [span for span in spans if span.stop]
        if not spans:
            raise UserError(f"text:{pattern} matches {len(paths)} file(s), all empty")
        self._spans = _in_split(spans, split, root)
        if not self._spans:
            raise UserError(
                f"none of the {len(spans)} files of text:{pattern} falls into split '{split}': "
                "use split 'all' with a slice, as in 'all[:10%]'"
            )
        self.num_bytes = sum(span.stop - span.start for span in self._spans)
        self.fingerprint = digest(
            *(f"{span.path.relative_to(root)} {span.start} {span.stop}" for span in self._spans),
            files_digest(sorted({span.path for span in self._spans})),
        )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        span = self._spans[index]
        return decode_utf8(_read(span), span.path, span.start)


def matching_files(pattern: str, kind: str) -> tuple[Path, list[Path]]:
    """Returns the folder all matches share and the files that match, sorted.

    Raises:
      UserError: nothing matches.
    """
    pattern = os.path.expanduser(pattern)
    paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not paths:
        raise UserError(f"no file matches {kind}:{pattern}: check the path (relative to {Path.cwd()}) and quote the *")
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    return Path(os.path.dirname(fixed)), paths


def hashed_split(key: str) -> str:
    """Returns the split of a document by its key: 5% test, 5% validation, the rest train."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 20, "train")


def decode_utf8(data: bytes, path: Path, offset: int) -> str:
    """Decodes bytes found at `offset` of `path`.

    Raises:
      UserError: they are no UTF-8; the message has the offset of the first bad byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}): convert it "
            "(iconv -f LATIN1 -t UTF-8) or leave it out of the glob"
        ) from None


def files_digest(paths: list[Path]) -> str:
    """Returns a digest of the files' contents; of their sizes, times and ends where they are huge."""
    stats = [path.stat() for path in paths]
    if sum(stat.st_size for stat in stats) <= _HASHED_WHOLE:
        return digest(*(path.read_bytes() for path in paths))
    parts = []
    for path, stat in zip(paths, stats):
        with path.open("rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, stat.st_size - _ENDS))
            parts += [f"{stat.st_size} {stat.st_mtime_ns}", head, file.read(_ENDS)]
    return digest(*parts)


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file, decompressed by its suffix.

    Raises:
      UserError: the compressed file is damaged.
    """
    opener = OPENERS.get(path.suffix)
    if opener is None:
        return path.read_bytes()
    with decompressing(path), opener(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def decompressing(path: Path) -> Iterator[None]:
    """Turns what damaged compressed files raise into a `UserError` that names the file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # no fault of the file's: what it is unpacked to does not fit
        raise UserError(f"{path} does not decompress ({error}): fetch it again or leave it out") from None


def unpacked(path: Path, data_dir: Path) -> Path:
    """Returns a file with random access: `path`, or a compressed one's content, kept under `data_dir`.

    Raises:
      UserError: the compressed file is damaged.
    """
    opener = OPENERS.get(path.suffix)
    if opener is None:
        return path
    stat = path.stat()
    key = digest(str(path.resolve()), f"{stat.st_size} {stat.st_mtime_ns}")

    def write(aside: Path) -> None:
        with decompressing(path), opener(path, "rb") as packed, aside.open("wb") as plain:
            shutil.copyfileobj(packed, plain)

    return create_once(data_dir / "unpacked" / key, write)


def _size(path: Path) -> int:
    return len(read_bytes(path)) if path.suffix in OPENERS else path.stat().st_size


def _read(span: _Span) -> bytes:
    if span.path.suffix in OPENERS:
        return read_bytes(span.path)[span.start : span.stop]
    with span.path.open("rb") as file:
        file.seek(span.start)
        return file.read(span.stop - span.start)


def _in_split(spans: list[_Span], split: str, root: Path) -> list[_Span]:
    if split == "all":
        return spans
    if len(spans) >= _FEW_FILES:
        return [span for span in spans if hashed_split(span.path.relative_to(root).as_posix()) == split]
    parts = [_part_of_file(span, split) for span in spans]
    return [part for part in parts if part.stop > part.start]


def _part_of_file(span: _Span, split: str) -> _Span:
    low, high = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}[split]
    return _Span(span.path, _line_border(span, low), _line_border(span, high))


def _line_border(span: _Span, share: float) -> int:
    """Returns the start of the first line at or after `share` of the file, or of a character if lines are long."""
    position = round(span.stop * share)
    if position in (0, span.stop):
        return position
    # One byte back, so that a border that is exactly a line start is kept.
    after = _read(_Span(span.path, position - 1, min(position + _ENDS, span.stop)))
    newline = after.find(b"\n")
    if newline >= 0:
        return position + newline
    while position < span.stop and after[1] & 0xC0 == 0x80:
        position, after = position + 1, after[1:]
    return position
