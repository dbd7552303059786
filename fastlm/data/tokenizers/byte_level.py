"""Bytes as tokens: no training, no unknown text, long sequences."""

import json
from typing import Any

import numpy as np

from fastlm.data.tokenizers.base import Tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 bytes, and one token that opens, ends and pads."""

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)] + [b""], bos=256, eos=256, pad=256)

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, int32."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the bytes, and the character that each belongs to."""
        ids = self.encode(text)
        opens_character = (ids & 0xC0) != 0x80  # in UTF-8 every other byte begins with the bits 10
        starts = (np.cumsum(opens_character) - 1).astype(np.int32)
        return ids, starts, starts + 1

    def to_json(self) -> str:
        """Returns the kind: there is nothing else."""
        return json.dumps({"kind": "bytes"})


def make(**_: Any) -> Tokenizer:
    """Returns the byte tokenizer; it has no settings."""
    return ByteTokenizer()
