"""Reading safetensors that are spread over several files, named by an index.

Notable: the index is a stranger's text, so it may name files beside itself only. A symbolic link
beside it is followed: the download cache of Hugging Face is made of them. Index and shards must agree
completely; a tensor that only one of the two knows means that they do not belong together.
"""

import contextlib
import os
from pathlib import Path

from fastlm.errors import UserError
from fastlm.models.weight_files.files import MAX_HEADER_BYTES, damaged, open_file, quoted, read_exactly
from fastlm.models.weight_files.safetensors import parse_json_object, read_safetensors
from fastlm.models.weight_files.source import StoredTensor


def read_sharded(path: Path, files: contextlib.ExitStack) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of all shards that the index at `path` names, and the shards' metadata.

    What the index says beside its map (the total size, often wrong) is not used.

    Raises:
      UserError: index or shards are missing, damaged, outside the folder, or contradict each other.
    """
    file, size = open_file(path, files)
    if size > MAX_HEADER_BYTES:
        raise damaged(path, f"an index of {size} bytes (limit {MAX_HEADER_BYTES})")
    index = parse_json_object(read_exactly(file, size, "the index"), path, "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or any(not isinstance(shard, str) for shard in weight_map.values()):
        raise damaged(path, "weight_map is not an object of file names")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        found, notes = read_safetensors(_beside(path, shard), files)
        _check_listed(path, shard, found, weight_map)
        tensors |= found
        metadata = notes | metadata
    for name, shard in weight_map.items():
        if name not in tensors:
            raise damaged(path, f"tensor {quoted(name)} should be in {shard} and is not")
    return tensors, metadata


def _beside(index: Path, shard: str) -> Path:
    # The name must be a bare one by the rules of every system, whichever this is.
    if not shard.isprintable() or shard in ("", ".", "..") or any(letter in shard for letter in "/\\:"):
        raise UserError(
            f"{index}: names the shard {quoted(shard)}, which is not a file beside it; do not trust this model"
        )
    path = index.parent / shard
    if not os.path.isfile(path):  # Path.is_file raises on an overlong name
        raise UserError(f"{index}: names the shard {quoted(shard)}, which is not there; download it too")
    return path


def _check_listed(path: Path, shard: str, found: dict[str, StoredTensor], weight_map: dict[str, str]) -> None:
    for name in found:
        if weight_map.get(name) != shard:
            elsewhere = f"in {quoted(weight_map[name])}" if name in weight_map else "nowhere"
            raise damaged(path, f"tensor {quoted(name)} is in {shard}, by the index {elsewhere}")
