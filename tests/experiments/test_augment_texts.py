"""Augmented rows: words replaced by words, labels carried over, no version twice, the same by the same seed."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import augment_texts, row_files
from experiments.augment_texts import WORD, Encoder, Place, versions
from fastlm.data import examples, tokenizers
from fastlm.data.examples import every
from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig

WORDS = ["the", "a", "state", "union", "of", "speech", "was", "good", "bad", "long", "very", "film", "not"]
SETTINGS = {"copies": 6, "chance": 0.4, "candidates": 4, "seed": 0, "rows_per_file": 2}
TEXTS = ["The state of the union, 1861: was  good!", "a speech-making film was not-good.", "1861 ... (?)", "bad"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *WORDS, "mak", "##ing", "##ion", ",", ".", "-", "1861"]
    library = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(special)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.make("huggingface", path=str(folder))
    cfg = ModelConfig(
        family="encoder",
        head="masked_language_model",
        vocab_size=tokenizer.vocab_size,
        max_length=16,
        layers=1,
        width=16,
        heads=2,
    )
    model = Model(cfg)
    words = augment_texts.whole_words(tokenizer, [*TEXTS, " ".join(WORDS)])
    return Encoder(model, jax.jit(model.init)(jax.random.key(0)), tokenizer, words, length=16, batch_size=4)


def test_words_are_replaced_whole_by_words(encoder):
    for text, found in zip(TEXTS, encoder.candidates(TEXTS, 4), strict=True):
        for word, others in found:
            own = text[word.start : word.stop]
            assert WORD.fullmatch(own) and len(others) == 4 == len(set(others))
            assert set(others) <= set(WORDS) - {own.lower()}, "'mak' only begins a word"
    spoken = [
        [text[word.start : word.stop] for word, _ in found] for text, found in zip(TEXTS, encoder.candidates(TEXTS, 4))
    ]
    assert spoken == [
        ["The", "state", "of", "the", "union", "was", "good"],
        ["a", "speech", "making", "film", "was", "not", "good"],
        [],
        ["bad"],
    ]


def test_candidates_are_the_models_likeliest_and_the_nearest_embeddings(encoder):
    ((word, others),) = encoder.candidates(["bad"], 3)[0]
    model, tokenizer = encoder.model, encoder.tokenizer
    tokens = np.array([[tokenizer.special("class"), tokenizer.special("mask"), tokenizer.special("separator")]])
    logits = jax.jit(lambda p, x: model.head(p, model.features(p, x)[0]))(encoder.params, tokens)[0, 1]
    by_logit = [encoder.words[int(id)] for id in np.argsort(-np.asarray(logits)) if int(id) in encoder.words]
    assert others == tuple(one for one in by_logit if one != "bad")[:3]
    ((word, others),) = encoder.candidates(["making"], 3)[0]
    assert (word.first, word.last) == (0, 1)
    table = np.array(encoder.params["embedding"]["table"])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    near = lambda id: table[id] @ table[tokenizer.encode("making")].mean(axis=0)
    assert others == tuple(encoder.words[id] for id in sorted(encoder.words, key=near, reverse=True)[:3])


def test_words_behind_the_encoders_length_are_read_in_a_later_piece(encoder):
    text = "the state of the union was good " * 5
    found = encoder.candidates([text], 2)[0]
    assert len(found) == 35
    tokens = encoder.tokenizer.encode(text)
    for place in (0, 13, 14, 34):
        row = encoder.masked(tokens, place)
        assert len(row) <= 16 and (row == encoder.tokenizer.special("mask")).sum() == 1


places = st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("xyz"), min_size=1, max_size=3)), max_size=6)


@given(places, st.integers(1, 8), st.floats(0, 1), st.integers(0, 5))
def test_every_version_is_another_one_and_differs_in_words_alone(drawn, copies, chance, seed):
    """Words are "w", numbers "7" between them; only words are places, and candidates are no "w"."""
    text = " ".join("w" if word else "7" for word, _ in drawn)
    row = {"text": text, "label": "good", "score": 0.5}
    found = [Place("text", 2 * n, 2 * n + 1, tuple(others)) for n, (word, others) in enumerate(drawn) if word]
    make = lambda: versions(row, found, copies, chance, np.random.default_rng(seed))
    made = make()
    assert made == make() and made[0] == row
    assert len(made) == len({one["text"] for one in made}) <= copies + 1
    assert (len(made) == 1) == (not found)
    for one in made[1:]:
        assert {name: one[name] for name in ("label", "score")} == {"label": "good", "score": 0.5}
        for n, ((word, others), said) in enumerate(zip(drawn, one["text"].split(" "), strict=True)):
            assert said in ((*others, "w") if word else "7"), n


def test_places_of_several_fields():
    row = {"one": "w w", "two": "w"}
    found = [Place("one", 0, 1, ("long",)), Place("one", 2, 3, ("longer",)), Place("two", 0, 1, ("x",))]
    assert versions(row, found, 1, 1.0, np.random.default_rng(0))[1] == {"one": "long longer", "two": "x"}


@pytest.fixture
def source(tmp_path):
    rows = [{"text": text, "label": n, "split": "train"} for n, text in enumerate(TEXTS)]
    rows += [{"text": "of the union", "label": 9, "split": split} for split in ("validation", "test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return functools.partial(examples.load, f"jsonl:{tmp_path}/rows.jsonl", data_dir=tmp_path / "data")


def write(encoder, source, folder, **changes):
    settings = SETTINGS | changes
    make = functools.partial(augment_texts.augmented, encoder, ["text"], settings)
    others = {split: lambda split=split: augment_texts.plain(source(split)) for split in ("validation", "test")}
    return row_files.write(folder, settings, augment_texts.plain(source("train"), ["text"]), make, others)


def test_rows_that_a_run_reads_with_their_labels_and_splits(encoder, source, tmp_path):
    folder = tmp_path / "augmented"
    assert write(encoder, source, folder) == 4
    load = lambda split: list(examples.load(f"jsonl:{folder}/*.jsonl", split, data_dir=tmp_path / "data"))
    rows = load("train")
    assert set(rows[0]) == {"text", "label", "split"}
    by_label = {label: [row["text"] for row in rows if row["label"] == label] for label in range(4)}
    assert [texts[0] for texts in by_label.values()] == TEXTS
    assert len(by_label[0]) == 7 and by_label[2] == [TEXTS[2]] and 2 <= len(by_label[3]) <= 5
    for texts in by_label.values():
        assert len(set(texts)) == len(texts)
    apart = lambda text: WORD.sub("", text)
    assert {apart(text) for text in by_label[0]} == {apart(TEXTS[0])}
    assert [row["text"] for row in load("validation") + load("test")] == ["of the union"] * 2


def test_a_stopped_run_goes_on_and_rows_follow_from_the_seed(encoder, source, tmp_path):
    folder, again, other = (tmp_path / name for name in ("one", "again", "other"))
    write(encoder, source, folder)
    whole = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "train-00001.jsonl").unlink()
    assert write(encoder, source, folder) == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == whole
    write(dataclasses.replace(encoder, batch_size=3), source, again)
    assert {path.name: path.read_text() for path in again.iterdir()} == whole
    write(encoder, source, other, seed=1)
    assert (other / "train-00000.jsonl").read_text() != whole["train-00000.jsonl"]
    with pytest.raises(UserError, match="these rows have other settings .* name another --folder"):
        write(encoder, source, folder, seed=1)
    (folder / row_files.SETTINGS).unlink()
    with pytest.raises(UserError, match="holds rows without settings.json"):
        write(encoder, source, folder)


def test_lists_stay_lists_and_fields_have_to_be_there(source):
    rows = source("train")
    with pytest.raises(UserError, match=r"--fields: .* has no 'txt'; did you mean 'text'"):
        augment_texts.plain(rows, ["txt"])
    with pytest.raises(UserError, match=r"--fields: 'label' of .* holds no text"):
        augment_texts.plain(rows, ["label"])

    class Answers(examples.Examples):
        name, fields = "answers", ("answer",)
        __len__ = lambda self: 1
        __getitem__ = lambda self, index: {"answer": "a", every("answer"): ("a", "b")}

    assert augment_texts.plain(Answers()) == [{"answer": ["a", "b"]}]


def test_only_tokens_that_stand_alone_are_words(encoder):
    find = lambda *texts: set(augment_texts.whole_words(encoder.tokenizer, texts).values())
    assert find("making speech, 1861. The (union)") == {"speech", "the", "union"}
    assert find("making a mak") == {"a", "mak"}
    with pytest.raises(UserError, match="no token of this model is a whole word"):
        augment_texts.whole_words(ByteTokenizer(), ["the state"])
