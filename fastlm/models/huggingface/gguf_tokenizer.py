"""The tokenizer inside a GGUF file as a tokenizer.json, and back: byte-level BPE, its tokens and merges.

Notable: GGUF only names how text is split before the merges; the splits known here are those of
GPT-2, SmolLM, Llama 3 and Qwen2. Left out: SentencePiece-like tokenizers (kind "llama") and WordPiece.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlm.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


def _gpt2(library: Any) -> Any:
    return library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm(library: Any) -> Any:
    return library.pre_tokenizers.Sequence([library.pre_tokenizers.Digits(individual_digits=True), _gpt2(library)])


def _words(digits: str) -> Any:
    def make(library: Any) -> Any:
        split = library.pre_tokenizers.Split(library.Regex(_WORDS % digits), "isolated")
        return library.pre_tokenizers.Sequence(
            [split, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return make


_SPLITS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _words("{1,3}"), "qwen2": _words("")}


def rebuilt(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """Returns tokenizer.json and tokenizer_config.json made from the key-values of a GGUF file.

    Raises:
      UserError: there is no tokenizer, it is of another kind, or it contradicts itself.
    """
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(kind, str) or kind != "gpt2" or not isinstance(split, str) or split not in _SPLITS:
        raise UserError(
            f"{where}: its tokenizer (kind {kind!r:.40}, split {split!r:.40}) cannot be rebuilt, only kind 'gpt2' with "
            f"split {', '.join(_SPLITS)}; take tokenizer.json from the model's Hugging Face page"
        )
    tokens, merges = _checked(metadata, where)
    special = _special(metadata, tokens, where)
    try:
        model = _model(metadata, tokens, merges, split, special.get("bos_token"))
    except UserError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{where}: its tokenizer contradicts itself ({error}); the file is damaged") from None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {"tokenizer.json": model.encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def key_values(files: Mapping[str, bytes], size: int) -> dict[str, Any]:
    """Returns a tokenizer as the key-values of a GGUF file.

    Args:
      files: tokenizer.json and tokenizer_config.json.
      size: tokens that the model has; those that the tokenizer lacks are written as unused.

    Raises:
      UserError: it is of another kind, or splits text in a way that GGUF has no name for.
    """
    import tokenizers as library

    if "tokenizer.json" not in files:
        raise UserError(f"gguf: needs a tokenizer.json, the model has {', '.join(files) or 'no tokenizer files'}")
    told, config = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", b"{}"))
    split = _split_of(told.get("pre_tokenizer"), library)
    if told["model"].get("type") != "BPE" or split is None:
        raise UserError(
            f"gguf: holds byte-level BPE that splits text like {', '.join(_SPLITS)}; this tokenizer does not"
        )
    vocabulary = dict(told["model"]["vocab"])
    added = {token["content"]: token for token in told.get("added_tokens", ())}
    vocabulary |= {content: token["id"] for content, token in added.items()}
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for content, number in vocabulary.items():
        if number < size:
            tokens[number] = content
            special = content in added and (_CONTROL if added[content]["special"] else _USER_DEFINED)
            kinds[number] = special or _NORMAL
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in told["model"]["merges"]],
    }
    for role, key in _ROLES.items():
        content = config.get(role)
        content = content.get("content") if isinstance(content, dict) else content
        if content in vocabulary:
            values[key] = vocabulary[content]
    begins = (told.get("post_processor") or {}).get("single", ())
    values["add_bos_token"] = bool(begins) and "SpecialToken" in begins[0]
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = (
        {"tokenizer.chat_template": config["chat_template"]} if isinstance(config.get("chat_template"), str) else {}
    )
    return found | template


def _split_of(stored: Any, library: Any) -> str | None:
    """Returns the name of a way to split text."""
    for name, make in _SPLITS.items():
        known = library.Tokenizer(library.models.BPE())
        known.pre_tokenizer = make(library)
        if json.loads(known.to_str())["pre_tokenizer"] == stored:
            return name
    return None


def _checked(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[tuple[str, str]]]:
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges", [])
    if not _is_strings(tokens) or not _is_strings(merges) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: its tokenizer has no, or repeated, tokens; the file is damaged")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{where}: its tokenizer has merges that are not pairs; the file is damaged")
    return tokens, pairs


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _special(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    found = {}
    for role, key in _ROLES.items():
        token = metadata.get(f"tokenizer.ggml.{key}")
        if token is None:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
            raise UserError(
                f"{where}: tokenizer.ggml.{key} is no token of the {len(tokens)} there are; the file is damaged"
            )
        found[role] = tokens[token]
    return found


def _model(
    metadata: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]], split: str, bos: str | None
) -> str:
    import tokenizers as library

    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe")
    tokenizer = library.Tokenizer(bpe)
    if split == "qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITS[split](library)
    tokenizer.decoder = library.decoders.ByteLevel()
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))
    for number in np.flatnonzero((types == _CONTROL) | (types == _USER_DEFINED)):
        control = bool(types[number] == _CONTROL)
        added = library.AddedToken(tokens[number], special=control, normalized=False)
        (tokenizer.add_special_tokens if control else tokenizer.add_tokens)([added])
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer.to_str()
