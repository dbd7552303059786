"""What lies beside the weights: tokenizer files, chat template, ids for generation, pooling, names of labels.

Notable: files are taken by a fixed list of names, so nothing a stranger's folder holds is copied
unseen. Ids come from generation_config.json, then config.json. Pooling is what sentence-transformers
keeps in `1_Pooling`, and modules.json says what it runs after the body: nothing but that and a `Normalize`
(which our embeddings always have) is what we compute.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import UserError
from fastlm.models.huggingface.options import MAX_JSON_BYTES, Options, read_json

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
MAX_CARD_BYTES = 1 << 16
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
)
GENERATION_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_MODULES_FILE = "modules.json"
_POOLING_FILE = "1_Pooling/config.json"
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the tokenizer's files by name.

    Raises:
      UserError: one cannot be read or is absurdly large.
    """
    found = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_JSON_BYTES:
                raise UserError(f"{path}: too large for a tokenizer ({path.stat().st_size} bytes); remove it")
            try:
                found[name] = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check the permissions") from None
    return found


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """Returns the (default) chat template of a tokenizer, or None."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    try:
        template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns how the tokenizer spells its "bos_token" and "eos_token", as far as its files say."""
    try:
        named = json.loads(files.get("tokenizer_config.json", b"{}"))
        found = {name: named.get(name) for name in ("bos_token", "eos_token")}
    except (ValueError, AttributeError, RecursionError):
        return {}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def license_of(folder: Path) -> str:
    """Returns the license that a model card names in its header; "" if nothing is named."""
    try:
        text = (folder / CARD).open("rb").read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    named = re.search(r"^license:[ \t]*(\S+)", head, re.MULTILINE)
    return license_name(named[1]) if named else ""


def license_name(value: Any) -> str:
    """Returns a license by its short name; "" for what is none, or does not say which."""
    name = value.strip().strip("'\"") if isinstance(value, str) else ""
    return name if re.fullmatch(r"[\w.+-]{2,40}", name) and name != "unknown" else ""


def generation_ids(folder: Path, options: Options) -> dict[str, int | list[int]]:
    """Returns the special ids that the model brings (`GENERATION_IDS`; eos may be several).

    Raises:
      UserError: one is no token id.
    """
    sources = [options]
    if (folder / GENERATION).is_file():
        sources.insert(0, Options(read_json(folder / GENERATION), str(folder / GENERATION)))
    return first_ids(sources)


def first_ids(sources: list[Options]) -> dict[str, int | list[int]]:
    """Returns each id from the first source that has it."""
    found: dict[str, int | list[int]] = {}
    for key in GENERATION_IDS:
        source = next((source for source in sources if key in source), None)
        if source is None:
            continue
        value = source.values[key]
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise source.error(key, "must be a token id or a list of them")
        found[key] = value
    return found


def pooling_of(folder: Path) -> str | None:
    """Returns how sentence-transformers pools this model, or None if nothing says so.

    Raises:
      UserError: in a way that we have not.
    """
    path = folder / _POOLING_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    named = values.get("pooling_mode")  # newer versions: one name
    if isinstance(named, str):
        chosen = [
            f"pooling_mode_{named}" if named == "lasttoken" else f"pooling_mode_{named}_token{'s' * (named == 'mean')}"
        ]
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise UserError(f"{path}: pooling {chosen} is not supported, only one of {', '.join(_POOLING)}")
    return _POOLING[chosen[0]]


def sentence_modules(folder: Path) -> tuple[str, ...]:
    """Returns what sentence-transformers runs behind the body: Pooling, perhaps Normalize; nothing if no file says so.

    Raises:
      UserError: something else, a dense layer say, which we would leave out.
    """
    path = folder / _MODULES_FILE
    if not path.is_file():
        return _MODULES[1:2] if (folder / _POOLING_FILE).is_file() else ()
    listed = [module if isinstance(module, dict) else {} for module in read_json(path, list)]
    # Newer versions have the same names under longer paths.
    names = tuple(str(module.get("type", "")).rpartition(".")[2] for module in listed)
    if names not in (_MODULES, _MODULES[:2]):
        raise UserError(
            f"{path}: modules {', '.join(names)[:200]!r} are not supported, only {', '.join(_MODULES)} (the last or "
            "not); read it with the head of another task, or remove this file if you want the body alone"
        )
    if listed[1].get("path") != str(Path(_POOLING_FILE).parent):
        raise UserError(f"{path}: Pooling lies in {listed[1].get('path')!r:.60}, not in '{Path(_POOLING_FILE).parent}'")
    return names[1:]


def sentence_files(modules: tuple[str, ...], pooling: str, width: int) -> dict[str, str]:
    """Returns the files by which sentence-transformers knows a model that pools in this way."""
    names = (_MODULES[0], *(modules or _MODULES[1:2]))
    listed = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    modes = {key: kind == pooling for key, kind in _POOLING.items()}
    return {
        _MODULES_FILE: json.dumps(listed, indent=2),
        _POOLING_FILE: json.dumps({"word_embedding_dimension": width} | modes, indent=2),
    }


def label_names(options: Options) -> tuple[str, ...]:
    """Returns the names of the classes in their order; empty where the file gives none."""
    labels = options.section("id2label")
    if labels is None:
        return ()
    try:
        ordered = sorted(labels.values.items(), key=lambda item: int(item[0]))
    except ValueError:
        raise options.error("id2label", "must be names by number") from None
    if [int(key) for key, _ in ordered] != list(range(len(ordered))):
        raise options.error("id2label", "must number the classes from 0")
    return tuple(str(name) for _, name in ordered)


def problem_type(classes: int) -> str:
    """Returns how config.json calls what a "sequence" head of so many numbers is for; left out, it means the same."""
    return "regression" if classes == 1 else "single_label_classification"


def described_labels(labels: tuple[str, ...], classes: int) -> dict[str, Any]:
    """Returns the options of config.json for `classes` classes of these names (or numbered ones)."""
    names = labels if len(labels) == classes else tuple(f"LABEL_{i}" for i in range(classes))
    return {
        "num_labels": classes,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
