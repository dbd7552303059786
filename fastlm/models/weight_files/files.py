"""Opening a file somebody else made, and saying in one line what is wrong with it.

Notable: only regular files are opened (a named pipe would hang), and what is not a weight file at
all (a Git LFS pointer, a web page saved under the name, a renamed PyTorch archive) is recognised by
its first bytes, because "absurd header" would send people looking in the wrong place.
"""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from fastlm.errors import UserError

# Also the limit of the reference implementation of safetensors; headers of the largest models hold a few MB.
MAX_HEADER_BYTES = 100_000_000

CONVERT_PICKLE = (
    "pickle files can run any code and are never loaded; where torch and safetensors are installed, convert it with "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), or load the model with "
    "transformers and call save_pretrained(FOLDER, safe_serialization=True)"
)
_FOREIGN_STARTS = {
    b"PK\x03\x04": f"is a zip archive, probably a PyTorch checkpoint; {CONVERT_PICKLE}",
    b"\x80\x02\x8a\nl\xfc": f"is a PyTorch checkpoint; {CONVERT_PICKLE}",
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; run 'git lfs pull' where it was cloned",
    b"<!DOCTYPE": "is a web page, not weights; download the file itself",
    b"<html": "is a web page, not weights; download the file itself",
}


def quoted(text: str) -> str:
    """Returns text from a file as one printable line of bounded length, in quotes."""
    return ascii(text if len(text) <= 100 else text[:97] + "...")


def damaged(path: str | os.PathLike[str], what: str) -> UserError:
    """Returns the error for a file whose content contradicts itself."""
    return UserError(f"{path}: {what}; the file is truncated or damaged: download or convert it again")


def open_file(path: Path, files: contextlib.ExitStack) -> tuple[BinaryIO, int]:
    """Opens `path` for reading, to be closed with `files`; returns it with its size in bytes.

    Raises:
      UserError: it is missing, unreadable, not a regular file, or by its first bytes no weight file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; name a .safetensors or .gguf file or a folder with weights")
        file = files.enter_context(path.open("rb"))
        start = file.read(64)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from None
    for magic, explanation in _FOREIGN_STARTS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {explanation}")
    return file, size


def read_exactly(file: BinaryIO, count: int, what: str) -> bytes:
    """Reads the next `count` bytes, which the caller has checked to lie within the file.

    Raises:
      UserError: the file ended early (it is being changed), or the disk failed.
    """
    try:
        content = file.read(count)
    except OSError as error:
        raise damaged(file.name, f"{what} cannot be read ({error.strerror})") from None
    if len(content) != count:
        raise damaged(file.name, f"{what} is cut off")
    return content
