"""Marian's tokenizers as Helsinki-NLP ships them: source.spm, target.spm and vocab.json.

Notable: two SentencePiece models cut the two languages; one vocabulary of both numbers the pieces, whatever numbers the
models give them, and what it lacks is unknown. A text may begin with the code of the language to write (">>fra<<").
Left out: Moses' normalisation of punctuation, which transformers does where `sacremoses` is installed; vocabularies
of their own for each language.
"""

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastlm.data.tokenizers.base import Tokenizer, existing_file
from fastlm.data.tokenizers.sentencepiece import places, sentencepiece_bytes
from fastlm.errors import UserError

FILES = ("source.spm", "target.spm", "vocab.json")
END, UNKNOWN, PADDING = "</s>", "<unk>", "<pad>"
_LANGUAGE = re.compile(r">>.*?<<")


class MarianTokenizer(Tokenizer):
    """A SentencePiece model for each language, and the vocabulary of both."""

    opens_with_space = True

    def __init__(self, source: bytes, target: bytes, vocabulary: dict[str, int]) -> None:
        """Builds it from the bytes of two `.spm` files and the ids of all pieces.

        Raises:
          UserError: the ids do not count from 0, or there is none for the end or for what is unknown.
        """
        import sentencepiece

        for name in (END, UNKNOWN):
            if name not in vocabulary:
                raise UserError(f"the vocabulary has no {name}")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise UserError("the ids of the vocabulary are not the numbers from 0 on, each once")
        self._models, self._vocabulary = (source, target), vocabulary
        self._source, self._target = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in self._models)
        special = {END, UNKNOWN, PADDING, "<s>"}
        pieces = [
            b"" if piece in special or _LANGUAGE.fullmatch(piece) else sentencepiece_bytes(piece)
            for piece in sorted(vocabulary, key=vocabulary.__getitem__)
        ]
        end = vocabulary[END]
        super().__init__(pieces, bos=None, eos=end, pad=vocabulary.get(PADDING, end))

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text of the source language, int32 [tokens]."""
        return self._ids(self._source, text)

    def encode_target(self, text: str) -> np.ndarray:
        """Returns the ids of a text of the target language, int32 [tokens]."""
        return self._ids(self._target, text)

    def _ids(self, library: Any, text: str) -> np.ndarray:
        begin, unknown = _behind_language(text), self._vocabulary[UNKNOWN]
        pieces = [text[:begin]] * bool(begin) + library.encode(text[begin:], out_type=str)
        return np.array([self._vocabulary.get(piece, unknown) for piece in pieces], np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the ids of a text of the source language, and where in it each token stands."""
        begin = _behind_language(text)
        starts, ends = (place + begin for place in places(self._source, text[begin:]))
        if begin:
            starts, ends = np.insert(starts, 0, 0), np.insert(ends, 0, begin)
        return self.encode(text), starts, ends

    def to_json(self) -> str:
        """Returns the vocabulary, and both models in base64."""
        source, target = (base64.b64encode(model).decode() for model in self._models)
        return json.dumps({"kind": "marian", "source": source, "target": target, "vocabulary": self._vocabulary})

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        return MarianTokenizer, (*self._models, self._vocabulary)


def _behind_language(text: str) -> int:
    language = _LANGUAGE.match(text)
    return language.end() if language else 0


def make(*, path: str, **_: Any) -> Tokenizer:
    """Reads the three files of a folder.

    Raises:
      UserError: one is missing, or is not what its name says.
    """
    folder = existing_file(path, "marian", FILES[0]).parent
    source, target, vocabulary = (existing_file(str(folder / name), "marian", name) for name in FILES)
    try:
        named = json.loads(vocabulary.read_text(encoding="utf-8"))
        return MarianTokenizer(source.read_bytes(), target.read_bytes(), named)
    except UserError as error:
        raise UserError(f"{vocabulary}: {error}") from None
    except Exception as error:
        raise UserError(
            f"{folder}: {', '.join(FILES)} are no tokenizer of Marian ({type(error).__name__}: {error})"
        ) from None


def from_base64(source: str, target: str, vocabulary: dict[str, int]) -> Tokenizer:
    """Rebuilds it from its stored form."""
    return MarianTokenizer(base64.b64decode(source), base64.b64decode(target), vocabulary)
