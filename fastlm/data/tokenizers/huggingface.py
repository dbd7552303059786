"""Tokenizers of the `tokenizers` library: a `tokenizer.json` as Hugging Face models bring it.

Notable: what a token stands for is read from the vocabulary once (byte-level alphabet, ``##`` of WordPiece,
``\u2581`` of SentencePiece). A `tokenizer.json` does not say which token ends a text; the `tokenizer_config.json`
beside it does. Which special tokens stand around texts is left to tasks, who ask `layout`: what the file's
post-processor would add. Text that spells a special token is encoded as text, but in `encode_marked`, which chats
use. Left out: the library's clean-up of spaces when it decodes.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.tokenizers import layout
from fastlm.data.tokenizers.base import Tokenizer, existing_file
from fastlm.data.tokenizers.layout import Layout
from fastlm.data.tokenizers.sentencepiece import sentencepiece_bytes
from fastlm.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, our own BPE among them."""

    def __init__(self, model: str, *, kind: str, bos: int | None, eos: int, pad: int) -> None:
        """Builds it from the text of a `tokenizer.json` and its special ids (which may lie beyond its vocabulary)."""
        from tokenizers import Tokenizer as Library

        self._model, self._kind = model, kind
        self._library = Library.from_str(model)
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # text is text, even if it spells a special token
        self._layouts = layout.of_post_processor(self._library.post_processor)
        self._library.post_processor = None  # adds special tokens, which tasks do themselves, and trims offsets
        self.opens_with_space = not _is_byte_level(self._library)
        ids = [*self._library.get_vocab(with_added_tokens=True).values(), eos, pad, -1 if bos is None else bos]
        ids += [token for one in self._layouts or () for group in one.special for token in group]
        super().__init__(_token_pieces(self._library, max(ids) + 1), bos=bos, eos=eos, pad=pad)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [tokens]."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the ids, and where in `text` each token stands, with the space that it opens with."""
        encoding = self._library.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), places[:, 0], places[:, 1]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts on all cores."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def special(self, role: str) -> int | None:
        """Returns the id of the token with the usual name for `role`."""
        return next((token for name in _ROLES[role] if (token := self._library.token_to_id(name)) is not None), None)

    def layout(self, texts: int) -> Layout | None:
        """Returns what the file's post-processor makes of one text or two; None if it adds nothing."""
        return None if self._layouts is None else self._layouts[texts - 1]

    def encode_marked(self, text: str) -> np.ndarray:
        """Returns the ids of a text whose markers stand for special tokens, int32 [tokens]."""
        self._library.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._library.encode_special_tokens = True

    def markers(self) -> list[str]:
        """Returns the added tokens' spellings."""
        return [entry.content for entry in self._library.get_added_tokens_decoder().values()]

    def to_json(self) -> str:
        """Returns the model and the special ids."""
        special = {"bos": self.bos, "eos": self.eos, "pad": self.pad}
        return json.dumps({"kind": self._kind, "model": self._model, **special})

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        settings = {"kind": self._kind, "bos": self.bos, "eos": self.eos, "pad": self.pad}
        return partial(HuggingFaceTokenizer, **settings), (self._model,)


def make(*, path: str, **_: Any) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      UserError: the file is missing, is no tokenizer, or names no end token.
    """
    file = existing_file(path, "huggingface", "tokenizer.json")
    try:
        model = file.read_text(encoding="utf-8")
        json.loads(model)["model"]  # before the search for special tokens, whose error would mislead
        special = _special_ids(model, file.parent / "tokenizer_config.json")
        return HuggingFaceTokenizer(model, kind="huggingface", **special)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} is no tokenizer.json ({type(error).__name__}: {error})") from None


def _token_pieces(library: Any, size: int) -> list[bytes]:
    """Returns the bytes of the tokens 0 .. size-1 of a `tokenizers` object, empty for special ones and gaps."""
    to_bytes = _byte_level_bytes if _is_byte_level(library) else sentencepiece_bytes
    if type(library.model).__name__ == "WordPiece":
        to_bytes = _wordpiece_bytes
    added = {int(token): entry for token, entry in library.get_added_tokens_decoder().items()}
    pieces = [b""] * size
    for text, token in library.get_vocab(with_added_tokens=True).items():
        if token not in added:
            pieces[token] = to_bytes(text)
        elif not added[token].special:
            pieces[token] = text.encode("utf-8")
    return pieces


def _is_byte_level(library: Any) -> bool:
    parts = json.loads(library.to_str())
    return "ByteLevel" in json.dumps([parts["decoder"], parts["pre_tokenizer"]])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(text: str) -> bytes:
    return bytes(_BYTE_ALPHABET[character] for character in text if character in _BYTE_ALPHABET)


def _wordpiece_bytes(text: str) -> bytes:
    """Returns the bytes of a WordPiece token: a word opens with a space, ``##`` continues it."""
    return text[2:].encode("utf-8") if text.startswith("##") else b" " + text.encode("utf-8")


_ROLES = {
    "mask": ("[MASK]", "<mask>"),
    "class": ("[CLS]", "<s>"),
    "separator": ("[SEP]", "</s>"),
}
_USUAL_NAMES = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "pad": ("<pad>", "<|padding|>", "[PAD]", "<|finetune_right_pad_id|>"),
}


def _special_ids(model: str, configuration: Path) -> dict[str, int | None]:
    """Returns bos, eos and pad of a `tokenizer.json` (which does not name them).

    The `tokenizer_config.json` beside it decides; without one, the usual names do.

    Raises:
      UserError: no end token is found.
    """
    parts = json.loads(model)
    ids = {entry["content"]: entry["id"] for entry in parts.get("added_tokens", [])}
    named = json.loads(configuration.read_text(encoding="utf-8")) if configuration.is_file() else {}
    found: dict[str, int | None] = {}
    for role, usual in _USUAL_NAMES.items():
        stated = named.get(f"{role}_token")
        stated = stated.get("content") if isinstance(stated, dict) else stated
        candidates = (stated,) if f"{role}_token" in named else usual
        found[role] = next((ids[name] for name in candidates if name in ids), None)
    if found["eos"] is None:
        raise UserError(
            f'no end token among the added tokens of the tokenizer: name it as "eos_token" in {configuration}'
        )
    found["pad"] = found["eos"] if found["pad"] is None else found["pad"]
    return found
