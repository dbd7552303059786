"""A tokenizer of fastlm as the files transformers reads: from what a checkpoint stores to tokenizer.json.

Notable: takes the stored JSON, since tokenizers stand on a floor above. Those trained here have one special
token, outside the vocabulary that text can reach, which opens and ends documents: it is added, and
put before a text, behind it or both, as the model was trained. Bytes become a byte-level BPE without merges.
"""

import base64
import json
from typing import Any

from fastlm.errors import UserError

END_OF_TEXT = "<|endoftext|>"
Files = tuple[dict[str, bytes], dict[int, str]]
"""Contents by name, and the spelling of special tokens by id."""
_ROLES = ("bos", "eos", "pad")


def files_of(
    stored: str, chat_template: str | None = None, *, opens: bool = True, closes: bool = False
) -> dict[str, bytes]:
    """Returns the files, by name, of a tokenizer that was stored as JSON.

    Args:
      opens: whether the special token of one that was trained here stands before a text.
      closes: whether it stands behind each text.

    Raises:
      UserError: it is of a kind without such files.
    """
    fields = json.loads(stored)
    if fields["kind"] not in _MODELS:
        raise UserError(f"tokenizer kind '{fields['kind']}' has no Hugging Face form; one of: {', '.join(_MODELS)}")
    files, tokens = _MODELS[fields["kind"]](fields)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if "tokenizer.json" in files:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for role in _ROLES:
        if fields.get(role) in tokens:
            config[f"{role}_token"] = tokens[fields[role]]
    if fields["kind"] in _TRAINED_HERE:
        files["tokenizer.json"] = _arranged(json.loads(files["tokenizer.json"]), opens, closes)
    if chat_template is not None:
        config["chat_template"] = chat_template
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def _kept(fields: dict[str, Any]) -> Files:
    """A tokenizer.json that came from elsewhere goes back as it came."""
    return {"tokenizer.json": fields["model"].encode()}, _token_names(json.loads(fields["model"]))


def _trained(fields: dict[str, Any]) -> Files:
    return _with_end(json.loads(fields["model"]), fields["eos"])


def _bytes(fields: dict[str, Any]) -> Files:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(vocab=_alphabet(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    fields |= dict.fromkeys(_ROLES, 256)
    return _with_end(json.loads(library.to_str()), 256)


def _numbers(fields: dict[str, Any]) -> Files:
    from tokenizers import Tokenizer, models, pre_tokenizers

    end = fields["vocab_size"] - 1
    library = Tokenizer(models.WordLevel({str(number): number for number in range(end)}, unk_token="0"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fields |= dict.fromkeys(_ROLES, end)
    return _with_end(json.loads(library.to_str()), end)


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _with_end(model: dict[str, Any], end: int) -> Files:
    """Adds the token that opens and ends documents."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model["added_tokens"] = [{"id": end, "content": END_OF_TEXT} | flags]
    return {"tokenizer.json": json.dumps(model, ensure_ascii=False).encode()}, _token_names(model)


def _arranged(model: dict[str, Any], opens: bool, closes: bool) -> bytes:
    """Says what stands around a text and around two; where nothing closes the first, a token opens the second."""
    first = [_special(0)] * opens + [_text("A", 0)] + [_special(0)] * closes
    second = [_special(1)] * (opens and not closes) + [_text("B", 1)] + [_special(1)] * closes
    end = model["added_tokens"][0]["id"]
    model["post_processor"] = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end], "tokens": [END_OF_TEXT]}},
    }
    return json.dumps(model, ensure_ascii=False).encode()


def _special(kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": END_OF_TEXT, "type_id": kind}}


def _text(which: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": which, "type_id": kind}}


def _token_names(model: dict[str, Any]) -> dict[int, str]:
    return {entry["id"]: entry["content"] for entry in model.get("added_tokens", [])}


def _sentencepiece(fields: dict[str, Any]) -> Files:
    return {"tokenizer.model": base64.b64decode(fields["model"])}, {}


def _marian(fields: dict[str, Any]) -> Files:
    files = {f"{side}.spm": base64.b64decode(fields[side]) for side in ("source", "target")}
    return files | {"vocab.json": json.dumps(fields["vocabulary"], ensure_ascii=False).encode()}, {}


_TRAINED_HERE = ("bpe", "bytes", "numbers")
_MODELS = {
    "huggingface": _kept,
    "bpe": _trained,
    "bytes": _bytes,
    "numbers": _numbers,
    "sentencepiece": _sentencepiece,
    "marian": _marian,
}
