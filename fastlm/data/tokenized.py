"""Documents as token ids: tokenized once and memory-mapped, or on the fly where they are too many.

Notable: training on a few cores must not pay for tokenizing each epoch (BPE runs at 0.2 to 0.5
million tokens/s on two cores, packing at many millions), so up to `CACHE_LIMIT` bytes of text are
tokenized on first use into one flat file and an offset table, named by the fingerprints of text and
tokenizer. Beyond that (C4, Wikipedia) documents are tokenized when read, and the number kept ready for shuffling is
smaller. A document is stored as ``[bos?] tokens eos``; one without text is stored as nothing.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastlm.data import sources
from fastlm.data.directory import create_once, data_directory
from fastlm.data.documents import Documents, digest
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError

CACHE_LIMIT = 1 << 28
_FORMAT = "tokens 1"
_BATCH_BYTES = 4 << 20
_logger = logging.getLogger(__name__)


class TokenizedDocuments:
    """Random access to token ids.

    Attributes:
      block_tokens: How many tokens a shard may hold ready to shuffle pieces among.
    """

    block_tokens = 1 << 17

    def __init__(self, documents: Documents, tokenizer: Tokenizer) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self.name, self.fingerprint = documents.name, documents.fingerprint

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns document `index` with its special tokens, [tokens] of an integer type; empty without text."""
        return self.get([index])[0]

    def get(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Returns several documents; faster than one by one."""
        return encode_documents([self._documents[index] for index in indices], self._tokenizer)


class CachedDocuments(TokenizedDocuments):
    """Token ids that lie in a memory-mapped file."""

    block_tokens = 1 << 21

    def __init__(self, documents: Documents, tokenizer: Tokenizer, data_dir: Path) -> None:
        """Opens the cache of these documents, tokenizing them first if there is none.

        Raises:
          UserError: the cache cannot be written.
        """
        super().__init__(documents, tokenizer)
        self._folder = data_dir / "tokens" / digest(_FORMAT, documents.fingerprint, tokenizer.fingerprint)
        create_once(self._folder, self._write)
        self._open()

    def _open(self) -> None:
        self._offsets = np.load(self._folder / "offsets.npy")
        dtype = _token_dtype(self._tokenizer.vocab_size)
        # An empty file cannot be mapped.
        self._tokens = (
            np.asarray(np.memmap(self._folder / "tokens.bin", dtype, mode="r"))
            if self._offsets[-1]
            else np.empty(0, dtype)
        )

    def _write(self, folder: Path) -> None:
        _logger.info("tokenizing %s (%.1f MB), once", self.name, self._documents.num_bytes / 1e6)
        folder.mkdir()
        offsets = [0]
        dtype = _token_dtype(self._tokenizer.vocab_size)
        with (folder / "tokens.bin").open("wb") as file:
            for texts in _batches(self._documents):
                for tokens in encode_documents(texts, self._tokenizer):
                    file.write(tokens.astype(dtype).tobytes())
                    offsets.append(offsets[-1] + len(tokens))
        np.save(folder / "offsets.npy", np.array(offsets, np.int64))

    def get(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Returns several documents, as views of the mapped file."""
        return [self._tokens[self._offsets[index] : self._offsets[index + 1]] for index in indices]

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64: tokens of each document."""
        return np.diff(self._offsets)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tokens", "_offsets")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()


def tokenize(documents: Documents, tokenizer: Tokenizer, data_dir: Path) -> TokenizedDocuments:
    """Returns the documents as token ids, cached on disk if they are few enough.

    Raises:
      UserError: there is not one token to predict in all of them.
    """
    if documents.num_bytes > CACHE_LIMIT:
        return TokenizedDocuments(documents, tokenizer)
    cached = CachedDocuments(documents, tokenizer, data_dir)
    if not (cached.lengths > 1).any():
        raise UserError(f"{documents.name} has {len(documents)} document(s) but no text in them")
    return cached


def open_sources(
    weighted: Sequence[tuple[str, float]],
    tokenizer: Tokenizer,
    split: str,
    data_dir: str | os.PathLike[str] | None,
) -> list[TokenizedDocuments]:
    """Loads and tokenizes a split of each source.

    Raises:
      UserError: a source is unknown, missing or empty.
    """
    folder = data_directory(data_dir)
    return [tokenize(sources.load(spec, split, data_dir=folder), tokenizer, folder) for spec, _ in weighted]


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns ``[bos?] tokens eos`` for each text, and nothing for an empty one."""
    opening = [] if tokenizer.bos is None else [tokenizer.bos]
    encoded = []
    for text, tokens in zip(texts, tokenizer.encode_batch(texts)):
        encoded.append(np.concatenate([opening, tokens, [tokenizer.eos]]).astype(np.int32) if text else tokens[:0])
    return encoded


def _batches(documents: Documents) -> Iterator[list[str]]:
    """Yields lists of texts of some megabytes, so that all cores have work and memory stays small."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _token_dtype(vocab_size: int) -> type[np.generic]:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
