"""Where prepared data lives, and how it gets there without half-written folders.

Notable: everything made here (prepared data sets, token caches, trained tokenizers) is written
aside under a random name and renamed, so a killed run leaves nothing that looks finished and two
processes that prepare the same thing at once are both right: the second rename loses and is
discarded. Left out: locks, since doing the work twice is harmless and a stale lock is not.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from fastlm.errors import UserError


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns `data_dir`, or $FASTLM_DATA, or ~/.cache/fastlm/data, with ~ expanded."""
    return Path(data_dir or os.environ.get("FASTLM_DATA") or "~/.cache/fastlm/data").expanduser()


def create_once(final: Path, write: Callable[[Path], None]) -> Path:
    """Makes `final` (a file or a folder) by `write(temporary path)` and a rename, unless it exists.

    Raises:
      UserError: the disk is full, or the place cannot be written to.
    """
    if final.exists():
        return final
    aside = final.parent / f".{final.name}.{uuid.uuid4().hex}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        _rename(aside, final)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise UserError(
            f"cannot write {final}: {error.strerror}; free space or name another folder (--data_dir or FASTLM_DATA)"
        ) from None
    finally:
        _remove(aside)
    return final


def _rename(aside: Path, final: Path) -> None:
    try:
        aside.rename(final)
    except OSError:
        # Renaming onto a folder that is not empty fails: another process was faster.
        if not final.exists():
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
