"""Byte-level BPE trained here (arXiv 1508.07909, over bytes as in GPT-2).

Notable: text is cut before merging by a pattern in the manner of GPT-4's: runs of spaces stay
together (indentation of code), numbers are cut in threes, one leading character joins a word. No
Unicode normalisation anywhere, so that bytes stay exact. The trained model is cached by what it was
trained on. Parallelism is left to the library's own default (all cores, off in forked children):
forcing TOKENIZERS_PARALLELISM on is what makes forked workers hang.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastlm.data.directory import create_once, data_directory
from fastlm.data.documents import Documents, digest
from fastlm.data.tokenizers.base import Tokenizer
from fastlm.data.tokenizers.huggingface import HuggingFaceTokenizer
from fastlm.errors import UserError

SMALLEST_VOCABULARY = 257
# Enough for a stable vocabulary; more only costs minutes.
_TRAINING_BYTES = 64 << 20
_RECIPE = "bpe 1"  # part of the cache key; raise it when the pattern or the trainer's settings change
_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def make(*, vocab_size: int, documents: list[Documents], data_dir: str | Path | None, **_: Any) -> Tokenizer:
    """Trains a BPE of `vocab_size` tokens (its special one included), or takes it from the cache.

    Raises:
      UserError: no documents, too small a vocabulary, or too little text for it.
    """
    if not documents:
        raise UserError("tokenizer kind 'bpe' is trained: it needs the documents of the train split")
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"tokenizer kind 'bpe' needs vocab_size >= {SMALLEST_VOCABULARY} (256 bytes, one special), not {vocab_size}"
        )
    model = train_cached(documents, vocab_size - 1, data_directory(data_dir))
    # The special token lies outside the vocabulary that text can reach.
    size = len(json.loads(model)["model"]["vocab"])
    return HuggingFaceTokenizer(model, kind="bpe", bos=size, eos=size, pad=size)


def train_cached(documents: Sequence[Documents], vocab_size: int, data_dir: Path) -> str:
    """Returns the `tokenizer.json` text of a BPE of `vocab_size` tokens, from the cache if it was trained before."""
    key = digest(_RECIPE, str(vocab_size), *(source.fingerprint for source in documents))
    path = data_dir / "tokenizers" / f"{key}.json"
    create_once(path, lambda aside: aside.write_text(train(documents, vocab_size), encoding="utf-8") and None)
    return path.read_text(encoding="utf-8")


def train(documents: Sequence[Documents], vocab_size: int) -> str:
    """Trains byte-level BPE without special tokens; returns its `tokenizer.json` text.

    Raises:
      UserError: there is too little text for so many tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(_training_texts(documents), trainer)
    if library.get_vocab_size() < vocab_size:
        raise UserError(
            f"too little text for a BPE of {vocab_size + 1} tokens: all merges are used up at "
            f"{library.get_vocab_size() + 1}; lower vocab_size to that or add text"
        )
    return library.to_str()


def _training_texts(documents: Sequence[Documents]) -> Iterator[str]:
    total = sum(source.num_bytes for source in documents)
    stride = max(1, -(-total // _TRAINING_BYTES))  # evenly over the whole, not the beginning
    for source in documents:
        for index in range(0, len(source), stride):
            yield source[index]
