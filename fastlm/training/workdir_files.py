"""The folder of a run: one writer at a time, and files, and folders that are exported, that are never half there."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastlm.errors import UserError, first_line
from fastlm.models.huggingface import folders
from fastlm.parallel import multihost

_logger = logging.getLogger(__name__)

LOCK = "lock"
TOKENIZER = "tokenizer"  # folder with the files of a tokenizer that came from elsewhere


def lock(workdir: Path) -> IO[str] | None:
    """Makes this process the folder's only writer for as long as the returned file is open.

    The system lets go of the lock when the process ends, however it ends. Of several processes of one
    run the first holds it for all; the others get None.

    Raises:
      UserError: another process trains there, or the folder cannot be written.
    """
    if not multihost.is_primary():
        return None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+")  # noqa: SIM115 (it stays open for as long as the run)
    except OSError as error:
        raise UserError(f"{workdir}: could not be written ({error.strerror}); check space and permissions") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{workdir}: another process ({holder}) is training there; wait for it, stop it, or use another --workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks; training there must stay possible
        _logger.warning("%s: no lock (%s); nothing keeps a second run from writing there", workdir, error.strerror)
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file


def carry_tokenizer(source: Path, workdir: Path) -> None:
    """Gives a workdir the tokenizer's files of another, and no others, where that keeps any.

    Raises:
      UserError: one cannot be read or written.
    """
    files = folders.tokenizer_files(source / TOKENIZER)
    for name, content in files.items():
        write_whole(workdir / TOKENIZER / name, content)
    for name in set(folders.TOKENIZER_FILES) - files.keys() if files else ():  # of an earlier run
        (workdir / TOKENIZER / name).unlink(missing_ok=True)


def require_free(target: Path) -> None:
    """Raises a `UserError` unless a folder is new or empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to: {target} exists and is not an empty folder; name another one")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a folder to write to, beside `target`, which becomes that at the end; whatever fails leaves nothing.

    Raises:
      UserError: there is something already; the disk is full, or the place cannot be written to.
    """
    require_free(target)
    target = target.resolve()
    aside = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"--to: {target}: could not be written ({reason}); check space and permissions") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside, then renames it, so that it is never half there.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.rename(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror}); check space and permissions") from None
