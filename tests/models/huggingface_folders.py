"""Golden folders of Hugging Face models, to read and to spoil."""

import json
import shutil
from pathlib import Path

import numpy as np

from fastlm.models.weight_files import open_weights, write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "huggingface"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "\u2581", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def copied(case, target):
    """A copy of a golden folder, to change."""
    return Path(shutil.copytree(GOLDEN / case, target))


def options_of(folder):
    return json.loads((folder / "config.json").read_text())


def with_options(folder, **changes):
    """Changes config.json; `...` removes an option."""
    options = {key: value for key, value in (options_of(folder) | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def tensors_of(folder):
    with open_weights(folder) as source:
        return {name: source.read(name) for name in source.names()}


def store(folder, tensors):
    """Replaces the weights of a folder."""
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    write_safetensors(folder, [(name, array, array.shape, array.dtype) for name, array in tensors.items()])


BERT = {"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}
ROBERTA = BERT | {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": True}


def with_tokenizer(folder, configuration, post_processor=None):
    """Gives a folder a tokenizer of letters, which by default starts texts with <s>, and a tokenizer_config.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "added_tokens": [{"id": i, "content": WORDS[i]} | flags for i in range(3)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "post_processor": post_processor
        or {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "merges": [],
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | configuration))
    return folder
