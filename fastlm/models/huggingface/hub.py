"""From what a user names to a folder or file on disk: a path as it is, a hub name by downloading.

Notable: only descriptions, tokenizers and safetensors are fetched, never pickle. `huggingface_hub` is optional;
without it or without a network the one line says to download the folder.
"""

import os
import re
from pathlib import Path

from fastlm.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.spm", "*.jinja")
# Other frameworks' weights and a model's own sub-folders, except how sentence-transformers pools.
_UNWANTED = ("onnx/*", "openvino/*", "original/*", "coreml/*")


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the folder or file that `source` names; a name of the hub is downloaded into its own cache.

    Raises:
      UserError: there is no such path, and it is no hub name that can be fetched; or a revision of what is on disk.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: {source} is on disk and has no revision '{revision}'; leave it out")
        return path
    if not _HUB_NAME.fullmatch(str(source)) or path.suffix in (".gguf", ".safetensors", ".bin"):
        raise UserError(f"{source}: no such file or folder; name one, or a model of the hub as OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{source}: no such folder, and models of the hub need 'pip install huggingface_hub'; or download the "
            "folder elsewhere and name it"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except Exception as error:  # the library raises its own, those of HTTP clients, and OSError
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{source}: no such folder, and it cannot be fetched from the hub ({reason[:200]}); check the name, or "
            "download the folder elsewhere and name it"
        ) from None
    return Path(folder)
