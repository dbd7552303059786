"""Marian's tokenizer: two languages cut by two models, numbered by one vocabulary."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece

from fastlm.data import tokenizers
from fastlm.data.settings import Data
from fastlm.errors import UserError
from fastlm.models import ModelConfig
from fastlm.tasks.sequence_to_sequence import SequenceToSequence
from tests.data import marian_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    marian_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.make("marian", path=str(folder))


def numbered(folder, side, text):
    """The ids of a text by the files themselves."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
    return [vocabulary.get(piece, vocabulary["<unk>"]) for piece in library.encode(text, out_type=str)]


def test_each_language_has_its_own_pieces_and_both_one_vocabulary(folder, tokenizer):
    english, spanish = "the cat sat on a dog", "el perro en la casa"
    assert tokenizer.encode(english).tolist() == numbered(folder, "source", english)
    assert tokenizer.encode_target(spanish).tolist() == numbered(folder, "target", spanish)
    assert tokenizer.encode(spanish).tolist() != tokenizer.encode_target(spanish).tolist()
    assert tokenizer.decode([*tokenizer.encode_target(spanish), tokenizer.eos, tokenizer.pad]) == spanish
    assert tokenizer.decode(tokenizer.encode(english)) == english
    assert tokenizer.encode("a 数 dog").tolist().count(1) == 1 and tokenizer.encode("").tolist() == []
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 0, vocabulary["<pad>"])
    assert tokenizer.vocab_size == len(vocabulary) == vocabulary["<pad>"] + 1


def test_a_text_may_begin_with_the_language_to_write(folder, tokenizer):
    code = json.loads((folder / "vocab.json").read_text())[">>spa<<"]
    assert tokenizer.encode(">>spa<< the cat").tolist() == [code, *tokenizer.encode("the cat")]
    assert tokenizer.encode(">>xyz<< the cat").tolist() == [1, *tokenizer.encode("the cat")]
    assert tokenizer.token_bytes[code] == 0


@pytest.mark.parametrize("text", ["the cat sat", ">>spa<< the 数 cat", "", ">>spa<<"])
def test_offsets_name_the_characters_of_each_token(text, tokenizer):
    ids, starts, ends = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode(text).tolist() and starts.dtype == ends.dtype == np.int32
    for token, start, end in zip(ids, starts, ends, strict=True):
        if tokenizer.pieces[token].strip():
            assert tokenizer.pieces[token].strip().decode() == text[start:end].strip()
    assert not len(ids) or (starts[0], ends[-1]) == (0, len(text))


def test_stored_and_made_again(tokenizer):
    for again in (tokenizers.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint and again.pieces == tokenizer.pieces
        assert again.encode_target("el gato").tolist() == tokenizer.encode_target("el gato").tolist()


def test_a_row_reads_one_language_and_writes_the_other(folder, tokenizer):
    cfg = ModelConfig(family="encoder_decoder", encoder_layers=1, vocab_size=99)
    kind = SequenceToSequence(start=tokenizer.pad)
    row = kind.encoder(cfg, tokenizer, Data(sources=(), length=30))({"source": "the cat", "target": "el gato"})
    assert row["source"].tolist() == [*numbered(folder, "source", "the cat"), 0]
    assert row["targets"].tolist() == [*numbered(folder, "target", "el gato"), 0]
    assert row["tokens"].tolist() == [tokenizer.pad, *row["targets"][:-1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("target.spm", None, "target.spm does not exist"),
        ("source.spm", b"no model", "source.spm, target.spm, vocab.json are no tokenizer of Marian"),
        ("vocab.json", b"[1, 2]", "vocab.json: the vocabulary has no </s>"),
        (
            "vocab.json",
            b'{"</s>": 0, "<unk>": 1, "a": 99999999999}',
            "vocab.json: the ids .* are not the numbers from 0",
        ),
        ("vocab.json", b'{"</s>": 0, "<unk>": "1"}', "no tokenizer of Marian"),
        ("vocab.json", b"{", "no tokenizer of Marian"),
    ],
)
def test_files_that_are_none(name, content, message, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content) if content is not None else (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message) as raised:
        tokenizers.make("marian", path=str(tmp_path))
    assert "\n" not in str(raised.value)
