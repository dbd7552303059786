"""Tokenizers whose vocabulary is given, and rows of their tokens."""

import json
import re

import numpy as np

from fastlm.data.packing import Piece, build_row
from fastlm.data.tokenized import encode_documents
from fastlm.data.tokenizers.base import Tokenizer


class Pieces(Tokenizer):
    """Writes a text with the longest pieces that fit, from the left; the 256 bytes and the end are always there."""

    def __init__(self, *longer, bos=True, opens_with_space=False, lower=False):
        pieces = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in longer] + [b"", b""]
        self.opens_with_space, self.lower = opens_with_space, lower
        super().__init__(pieces, bos=len(pieces) - 2 if bos else None, eos=len(pieces) - 1, pad=0)
        self.numbers = {piece: number for number, piece in enumerate(pieces) if piece}
        longest = sorted(self.numbers, key=len, reverse=True)
        self.pattern = re.compile(b"|".join(map(re.escape, longest)), re.DOTALL)

    def encode(self, text):
        text = " " * self.opens_with_space + (text.lower() if self.lower else text)
        return np.array([self.numbers[piece] for piece in self.pattern.findall(text.encode())], np.int32)

    def encode_with_offsets(self, text):
        raise NotImplementedError("abstract in the base; no test of batches asks for offsets")

    def to_json(self):
        return json.dumps([piece.hex() for piece in self.pieces])


def packed(tokenizer, texts, length):
    """A batch of one row in which whole documents stand side by side."""
    encoded = encode_documents(texts, tokenizer)
    row = build_row([(tokens, Piece(0, 0, len(tokens) - 1)) for tokens in encoded], length, tokenizer.pad)
    return {name: row[name][None] for name in row}
