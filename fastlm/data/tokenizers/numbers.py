"""Numbers as tokens: "0 255 17" is three tokens. For pixels, and whatever else comes as whole numbers.

A text of such numbers is what images become as a field of a row (`examples/tfds_rows.py`), and what a column of a
user's file may hold; so sequences that are no language go through everything that texts do.
"""

import json
import re
from typing import Any

import numpy as np

from fastlm.data.tokenizers.base import Tokenizer
from fastlm.errors import UserError


class NumberTokenizer(Tokenizer):
    """The numbers from 0 to V - 2, and one token that opens, ends and pads."""

    opens_with_space = True

    def __init__(self, vocab_size: int) -> None:
        """Makes V pieces, the special token's among them.

        Raises:
          UserError: no room for a number.
        """
        if vocab_size < 2:
            raise UserError(f"tokenizer kind 'numbers' needs a vocab_size of at least 2 (257 for pixels): {vocab_size}")
        last = vocab_size - 1
        super().__init__([f" {number}".encode() for number in range(last)] + [b""], bos=last, eos=last, pad=last)

    def encode(self, text: str) -> np.ndarray:
        """Returns the numbers in `text`, int32.

        Raises:
          UserError: something else stands there.
        """
        try:
            ids = np.array(list(map(int, text.split())), np.int64)
        except (ValueError, OverflowError):
            ids = np.array([-1])
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.eos:
            wrong = next(word for word in text.split() if not word.isdecimal() or int(word) >= self.eos)
            raise UserError(
                f"tokenizer kind 'numbers' reads whole numbers from 0 to {self.eos - 1} with spaces between them, "
                f"not {wrong[:20]!r}"
            )
        return ids.astype(np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the numbers, and where they stand."""
        spans = np.array([word.span() for word in re.finditer(r"\S+", text)], np.int32).reshape(-1, 2)
        return self.encode(text), spans[:, 0], spans[:, 1]

    def to_json(self) -> str:
        """Returns the kind and V."""
        return json.dumps({"kind": "numbers", "vocab_size": self.vocab_size})


def make(vocab_size: int, **_: Any) -> Tokenizer:
    """Returns the tokenizer of the numbers below `vocab_size` - 1."""
    return NumberTokenizer(vocab_size)
