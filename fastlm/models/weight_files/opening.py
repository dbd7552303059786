"""From a path to its weights: which reader, and what to say when there is none."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from fastlm.errors import UserError
from fastlm.models.weight_files.files import CONVERT_PICKLE, quoted
from fastlm.models.weight_files.gguf import read_gguf
from fastlm.models.weight_files.safetensors import read_safetensors
from fastlm.models.weight_files.sharded import read_sharded
from fastlm.models.weight_files.source import WeightSource

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The first ending that matches decides.
_READERS: dict[str, Callable] = {
    ".safetensors": read_safetensors,
    ".safetensors.index.json": read_sharded,
    ".gguf": read_gguf,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")


def open_weights(path: str | os.PathLike[str]) -> WeightSource:
    """Opens the weights at `path` after checking their whole header; no tensor is read yet.

    Args:
      path: a .safetensors file, a .safetensors.index.json, a .gguf file, or a folder with
        `model.safetensors` or `model.safetensors.index.json` (the first wins, as in transformers).

    Raises:
      UserError: there is nothing to read, it is pickle, or it is damaged or hostile.
    """
    path = Path(path).expanduser()
    try:
        file = _entry_of(path) if path.is_dir() else path
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from None
    with contextlib.ExitStack() as files:
        tensors, metadata = _reader_for(file)(file, files)
        return WeightSource(path, tensors, metadata, files.pop_all())


def _reader_for(file: Path) -> Callable:
    name = file.name.lower()
    if name.endswith(_PICKLES):
        raise UserError(f"{file}: {CONVERT_PICKLE}")
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader
    raise UserError(
        f"{file}: not a weight file by its name; name a .safetensors or .gguf file or a folder with weights"
    )


def _entry_of(folder: Path) -> Path:
    for name in (SINGLE_FILE, INDEX):
        if (folder / name).exists():
            return folder / name
    here = sorted(entry.name for entry in folder.iterdir())
    readable = [name for name in here if name.lower().endswith(tuple(_READERS))]
    if readable:
        raise UserError(f"{folder}: holds no {SINGLE_FILE} but {quoted(readable[0])}; name the file itself")
    if any(name.lower().endswith(_PICKLES) for name in here):
        raise UserError(f"{folder}: holds pickle files only; {CONVERT_PICKLE}")
    raise UserError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX}; name the folder or file with the weights")
