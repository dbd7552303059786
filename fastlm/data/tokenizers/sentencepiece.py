"""SentencePiece models (`.model` files), arXiv 1808.06226.

Notable: the model file is kept whole, so that a checkpoint needs nothing beside it. SentencePiece
normalises text and puts a space before the first word, so byte counts are those of that text.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fastlm.data.tokenizers.base import Tokenizer, existing_file
from fastlm.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    opens_with_space = True

    def __init__(self, model: bytes) -> None:
        """Builds it from the bytes of a `.model` file.

        Raises:
          UserError: the model has no end-of-sentence piece.
        """
        import sentencepiece

        self._model = model
        self._library = library = sentencepiece.SentencePieceProcessor(model_proto=model)
        if library.eos_id() < 0:
            raise UserError("the SentencePiece model has no eos piece: train it with --eos_id")
        pieces = [self._bytes_of(token) for token in range(library.get_piece_size())]
        bos = library.bos_id() if library.bos_id() >= 0 else None
        pad = library.pad_id() if library.pad_id() >= 0 else library.eos_id()
        super().__init__(pieces, bos=bos, eos=library.eos_id(), pad=pad)

    def _bytes_of(self, token: int) -> bytes:
        library = self._library
        if library.is_control(token) or library.is_unknown(token) or library.is_unused(token):
            return b""
        return sentencepiece_bytes(library.id_to_piece(token))

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [tokens]."""
        return np.array(self._library.encode(text), np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the ids, and where in `text`, as it was before normalising, each token stands."""
        starts, ends = places(self._library, text)
        return self.encode(text), starts, ends

    def to_json(self) -> str:
        """Returns the model in base64."""
        return json.dumps({"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()})

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        return SentencePieceTokenizer, (self._model,)


def places(library: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns where in a text each piece of a SentencePiece model stands, first character and behind the last."""
    found = np.array(library.encode(text, out_type="offset_mapping")["offsets"], np.int32).reshape(-1, 2)
    # All but the last piece of a character (its bytes, the letters of a ligature) have empty places.
    empty, order = found[:, 0] == found[:, 1], np.arange(len(found))
    following = np.minimum.accumulate(np.where(empty, len(found), order)[::-1])[::-1]
    return found[:, 0], np.append(found[:, 1], len(text))[following].astype(np.int32)


def sentencepiece_bytes(text: str) -> bytes:
    """Returns the bytes of a SentencePiece token: U+2581 is a space, ``<0x0A>`` one byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode("utf-8")


def make(*, path: str, **_: Any) -> Tokenizer:
    """Reads a `.model` file.

    Raises:
      UserError: the file is missing or no SentencePiece model.
    """
    file = existing_file(path, "sentencepiece", "tokenizer.model")
    try:
        return SentencePieceTokenizer(file.read_bytes())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} is no SentencePiece model ({type(error).__name__}: {error})") from None


def from_base64(model: str) -> Tokenizer:
    """Rebuilds it from its stored form."""
    return SentencePieceTokenizer(base64.b64decode(model))
