"""Tokenizers: bytes, numbers, byte-level BPE trained here, Hugging Face, SentencePiece and Marian files.

A kind is one file with a `make`, and one line in each of the two tables here.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastlm.data.documents import Documents
from fastlm.data.tokenizers import bpe, byte_level, huggingface, marian, numbers, sentencepiece
from fastlm.data.tokenizers.base import StreamDecoder, Tokenizer
from fastlm.errors import UserError, nearest

__all__ = ["KINDS", "StreamDecoder", "Tokenizer", "from_json", "make"]

KINDS: dict[str, Callable[..., Tokenizer]] = {
    "bytes": byte_level.make,
    "numbers": numbers.make,
    "bpe": bpe.make,
    "huggingface": huggingface.make,
    "sentencepiece": sentencepiece.make,
    "marian": marian.make,
}
_FROM_JSON: dict[str, Callable[..., Tokenizer]] = {
    "bytes": byte_level.ByteTokenizer,
    "numbers": numbers.NumberTokenizer,
    "bpe": partial(huggingface.HuggingFaceTokenizer, kind="bpe"),
    "huggingface": partial(huggingface.HuggingFaceTokenizer, kind="huggingface"),
    "sentencepiece": sentencepiece.from_base64,
    "marian": marian.from_base64,
}


def make(
    kind: str,
    *,
    path: str = "",
    vocab_size: int = 0,
    documents: Documents | Sequence[Documents] | None = None,
    data_dir: str | Path | None = None,
) -> Tokenizer:
    """Returns a tokenizer of `kind`: bytes, numbers, bpe, huggingface, sentencepiece or marian.

    Args:
      kind: A key of `KINDS`.
      path: A `tokenizer.json` (or its folder), a `.model` file, or for marian the folder of its three files.
      vocab_size: For bpe and numbers, V with its special token.
      documents: For bpe, what to train on (the train split); the result is cached by their content.
      data_dir: Where the cache lies; see `directory.data_directory`.

    Raises:
      UserError: an unknown kind, a missing argument, or a file that is missing or no tokenizer.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer kind '{kind}'{nearest(kind, KINDS)} (one of: {', '.join(KINDS)})")
    sources = [documents] if isinstance(documents, Documents) else list(documents or ())
    return KINDS[kind](path=path, vocab_size=vocab_size, documents=sources, data_dir=data_dir)


def from_json(text: str) -> Tokenizer:
    """Rebuilds a tokenizer from its `to_json`.

    Raises:
      UserError: the text was not written by `to_json`.
    """
    try:
        fields = json.loads(text)
        kind = fields.pop("kind")
        return _FROM_JSON[kind](**fields)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the stored tokenizer cannot be read ({type(error).__name__}: {error}): "
            "the checkpoint is damaged or newer than this fastlm"
        ) from None
