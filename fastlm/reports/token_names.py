"""Tokens as a person reads them one by one: spaces and line ends visible, special tokens by their name."""

from collections.abc import Iterable

from fastlm.data.tokenizers import Tokenizer
from fastlm.tasks.masked_language_modeling import mask_token

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
ROLES = ("class", "separator")


def token_names(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Returns a name for each token, never empty; a part of a character is its bytes in hexadecimal."""
    special = _special_names(tokenizer)
    return [_name(tokenizer, int(token), special) for token in ids]


def _special_names(tokenizer: Tokenizer) -> dict[int, str]:
    names = {tokenizer.pad: "<pad>", tokenizer.eos: "<end>"}
    if tokenizer.bos is not None:
        names[tokenizer.bos] = "<start|end>" if tokenizer.bos == tokenizer.eos else "<start>"
    names[mask_token(tokenizer)] = "<mask>"
    names |= {token: f"<{role}>" for role in ROLES if (token := tokenizer.special(role)) is not None}
    marked = ((tokenizer.encode_marked(marker), marker) for marker in tokenizer.markers())
    return names | {int(ids[0]): marker for ids, marker in marked if len(ids) == 1}


def _name(tokenizer: Tokenizer, token: int, special: dict[int, str]) -> str:
    piece = tokenizer.pieces[token] if token < tokenizer.vocab_size else b""
    if not piece:
        return special.get(token, f"<{token}>")
    try:
        return piece.decode().translate(VISIBLE)
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
