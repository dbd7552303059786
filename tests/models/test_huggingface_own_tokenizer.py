"""Tokenizers of fastlm as tokenizer.json: the `tokenizers` library must give the same ids."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastlm.data import tokenizers
from fastlm.data.tokenizers import bpe
from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.data.tokenizers.huggingface import HuggingFaceTokenizer
from fastlm.data.tokenizers.layout import opened_and_closed
from fastlm.errors import UserError
from fastlm.models.huggingface import tokenizer_files
from fastlm.tasks.rows import row_layout

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SPELT = "<|endoftext|>"


class Texts(list):
    """Documents of a few words, with the size that training asks for."""

    num_bytes = 1000


@pytest.fixture(scope="module")
def trained():
    model = bpe.train([Texts(["the cat sat on the mat and the rat", "a na\u00efve caf\u00e9 12345"] * 5)], 280)
    size = len(json.loads(model)["model"]["vocab"])
    return HuggingFaceTokenizer(model, kind="bpe", bos=size, eos=size, pad=size)


def library_of(tokenizer):
    files = tokenizer_files(tokenizer.to_json())
    return Tokenizer.from_str(files["tokenizer.json"].decode()), json.loads(files["tokenizer_config.json"])


@given(text=TEXT)
def test_the_same_ids_as_ours_behind_the_start_token(text, trained):
    for ours in (trained, ByteTokenizer()):
        theirs, _ = library_of(ours)
        if SPELT not in text:
            assert theirs.encode(text).ids == [ours.bos, *ours.encode(text)]
            assert theirs.encode(text, add_special_tokens=False).ids == list(ours.encode(text))
            assert theirs.decode(list(ours.encode(text))) == text


def test_special_tokens_are_named(trained):
    for ours in (trained, ByteTokenizer()):
        theirs, config = library_of(ours)
        assert theirs.get_vocab_size() == ours.vocab_size
        for role in ("bos", "eos", "pad"):
            assert theirs.token_to_id(config[f"{role}_token"]) == getattr(ours, role)


@pytest.mark.parametrize(("opens", "closes"), [(True, False), (True, True), (False, True)])
def test_texts_stand_between_the_special_tokens_that_the_model_was_trained_with(opens, closes, trained, tmp_path):
    end = trained.eos
    for name, content in tokenizer_files(trained.to_json(), opens=opens, closes=closes).items():
        (tmp_path / name).write_bytes(content)
    again = tokenizers.make("huggingface", path=str(tmp_path))
    one, two = again.layout(1), again.layout(2)
    assert one == opened_and_closed([end] * opens, [end] * closes, 1)
    between = [end] if closes else [end] * opens
    assert [list(group) for group in two.special] == [[end] * opens, between, [end] * closes]
    if opens and closes:
        assert [row_layout(again, n) for n in (1, 2)] == [row_layout(trained, n) for n in (1, 2)] == [one, two]


def test_a_tokenizer_that_came_from_elsewhere_goes_back_unchanged(trained):
    model = json.loads(trained.to_json())["model"]
    parts = json.loads(model) | {"added_tokens": [added(300, "<end>"), added(301, "<start>")]}
    ours = HuggingFaceTokenizer(json.dumps(parts), kind="huggingface", bos=None, eos=300, pad=301)
    files = tokenizer_files(ours.to_json(), chat_template="{{ x }}")
    assert files["tokenizer.json"].decode() == json.dumps(parts)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["eos_token"], config["pad_token"], config["chat_template"]) == ("<end>", "<start>", "{{ x }}")
    assert "bos_token" not in config


def added(number, text):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": text} | flags


def test_sentencepiece_goes_back_as_its_file():
    files = tokenizer_files(json.dumps({"kind": "sentencepiece", "model": "YWJj"}))
    assert files["tokenizer.model"] == b"abc" and "tokenizer.json" not in files


def test_every_kind_has_a_form():
    assert set(tokenizers.KINDS) == {"bytes", "numbers", "bpe", "huggingface", "sentencepiece", "marian"}
    ours = tokenizers.make("numbers", vocab_size=257)
    theirs, config = library_of(ours)
    assert theirs.encode("0 255 17").ids == [256, *ours.encode("0 255 17")] == [256, 0, 255, 17]
    assert theirs.token_to_id(config["eos_token"]) == ours.eos
    with pytest.raises(UserError, match="kind 'words' has no Hugging Face form"):
        tokenizer_files(json.dumps({"kind": "words"}))
