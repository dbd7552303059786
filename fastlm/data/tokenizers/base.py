"""What every tokenizer is: a table of the bytes each token stands for, plus an `encode`.

Notable: the table gives decoding, streaming decoding and the byte counts behind bits per byte from one
source. For bytes and byte-level BPE it is exact: the pieces of `encode(text)` join to the UTF-8 of
`text`. WordPiece and SentencePiece normalise, so theirs join to the normalised text.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fastlm.data.documents import digest
from fastlm.data.tokenizers.layout import Layout
from fastlm.errors import UserError

_AROUND = ("bos", "eos", "pad")


class Tokenizer(ABC):
    """Text to token ids and back; immutable once made.

    Attributes:
      pieces: The bytes each token stands for, empty for special tokens.
      bos: Id that opens a document, or None.
      eos: Id that ends one.
      pad: Id that fills rows; may equal `eos`.
      opens_with_space: Whether the first word of a text has a space in its token, which is not in the text.
    """

    opens_with_space = False

    def __init__(self, pieces: Sequence[bytes], *, bos: int | None, eos: int, pad: int) -> None:
        self.pieces = tuple(pieces)
        self.bos, self.eos, self.pad = bos, eos, pad

    @property
    def vocab_size(self) -> int:
        """V, special tokens included."""
        return len(self.pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """[V] int32: UTF-8 bytes that each token stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest: equal fingerprints give equal ids."""
        return digest(self.to_json())

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [tokens], without special tokens."""

    def encode_target(self, text: str) -> np.ndarray:
        """Returns the ids of a text to be written, where reading and writing differ (Marian: two languages)."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts; on all cores where the library can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encodes `text`, and says where in it each token stands.

        Returns:
          The ids of `encode(text)`, and two int32 arrays of the same length: token i stands for characters
          `text[starts[i]:ends[i]]`. A token that begins or ends inside a character has all of that character.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; broken UTF-8 at either end becomes U+FFFD, specials and ids beyond V nothing."""
        text = b"".join(self._piece(int(token)) for token in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.opens_with_space else text

    def _piece(self, token: int) -> bytes:
        # A model may have its vocabulary padded to a multiple, so ids beyond V are possible.
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def special(self, role: str) -> int | None:
        """Returns the id of the special token that plays `role` ("mask", "class", "separator"), if there is one."""
        del role
        return None

    def layout(self, texts: int) -> Layout | None:
        """Returns how the model that this came with reads one text, or two as a pair; None where nothing says so."""
        del texts
        return None

    def encode_marked(self, text: str) -> np.ndarray:
        """Returns the ids of a text whose markers ("<|im_start|>") stand for special tokens, int32 [tokens].

        Raises:
          UserError: a tokenizer of this kind has no markers.
        """
        raise UserError("this tokenizer has no special tokens that a text can spell; take a model with a chat template")

    def markers(self) -> list[str]:
        """Returns the texts of which `encode_marked` makes one token each, whatever stands around them."""
        return []

    @abstractmethod
    def to_json(self) -> str:
        """Returns everything needed to make this tokenizer again, as JSON."""

    def splits_like(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens of every text; what opens, ends and fills rows may differ."""
        told = lambda one: {key: value for key, value in json.loads(one.to_json()).items() if key not in _AROUND}
        return told(self) == told(other)


class StreamDecoder:
    """Decodes tokens one by one and holds back the bytes of unfinished characters.

    With `whole`, the pieces join to what `Tokenizer.decode` gives; without, they go on from a text before them.
    """

    def __init__(self, tokenizer: Tokenizer, whole: bool = False) -> None:
        self._tokenizer = tokenizer
        self._opening = whole and tokenizer.opens_with_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the characters that `token` completes, often one word, sometimes nothing."""
        text = self._decoder.decode(self._tokenizer._piece(int(token)))
        if self._opening and text:
            self._opening, text = False, text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """Returns what is still held back, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def check_text(text: str, what: str) -> None:
    """Checks that a text is one (command lines may hold bytes that are no UTF-8).

    Raises:
      UserError: it is not, at which character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid UTF-8 at character {error.start}; convert it") from None


def existing_file(path: str, kind: str, name: str) -> Path:
    """Returns the file at `path`, which may also be the folder that holds `name`.

    Raises:
      UserError: there is no path or no such file.
    """
    if not path:
        raise UserError(f"tokenizer kind '{kind}' needs a path, to a {name} or its folder")
    file = Path(path).expanduser()
    file = file / name if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"tokenizer file {file} does not exist")
    return file
