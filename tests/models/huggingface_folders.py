"""Golden folders of Hugging Face models, to read and to spoil."""

import json
import shutil
from pathlib import Path

import numpy as np

from fastlm.models.weight_files import open_weights, write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "huggingface"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def copied(case, target):
    """A copy of a golden folder, to change."""
    return Path(shutil.copytree(GOLDEN / case, target))


def options_of(folder):
    return json.loads((folder / "config.json").read_text())


def with_options(folder, **changes):
    """Changes config.json; `...` removes an option."""
    options = {key: value for key, value in (options_of(folder) | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def tensors_of(folder):
    with open_weights(folder) as source:
        return {name: source.read(name) for name in source.names()}


def store(folder, tensors):
    """Replaces the weights of a folder."""
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    write_safetensors(folder, [(name, array, array.shape, array.dtype) for name, array in tensors.items()])
