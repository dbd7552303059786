"""Tokenizers: exact bytes, round trips, streaming, storage, and files that are none."""

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlm.data import sources, tokenizers
from fastlm.data.tokenizers import bpe
from fastlm.errors import UserError

TEXT = "The State of the Union, 1790: été, naïve, 数学!\n    def f(x):\n        return x  # 12345\n\n\n"


@pytest.fixture(scope="session")
def documents():
    return sources.load("state_of_the_union", "train[:4]")


@pytest.fixture(scope="session")
def trained(documents):
    return tokenizers.make("bpe", vocab_size=600, documents=documents)


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory, documents):
    """A `tokenizer.json` with special tokens, made by the library itself; and its folder."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(bpe.train([documents], 500))
    library.add_special_tokens(["<|endoftext|>", "<s>"])
    library.enable_truncation(5)
    library.enable_padding(length=9)
    folder = tmp_path_factory.mktemp("huggingface")
    library.save(str(folder / "tokenizer.json"))
    return tokenizers.make("huggingface", path=str(folder)), folder


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory, documents):
    import sentencepiece as library

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(documents[0].split(". ")))
    library.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
    )
    return tokenizers.make("sentencepiece", path=str(folder / "tokenizer.model"))


@pytest.fixture(params=["bytes", "bpe", "huggingface"], scope="session")
def exact(request, trained, huggingface):
    """Tokenizers whose pieces are the very bytes of the text."""
    return {"bytes": tokenizers.make("bytes"), "bpe": trained, "huggingface": huggingface[0]}[request.param]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
@example(TEXT)
@example("<|endoftext|><s>")
@example("\u0000\u00a0 e\u0301 \ufb01 \ufeff\r\n\t  ")
def test_bytes_are_exact(exact, text):
    ids = exact.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert exact.decode(ids) == text
    assert exact.token_bytes[ids].sum() == len(text.encode())
    specials = [exact.bos, exact.eos, exact.pad]
    assert not set(ids.tolist()) & set(specials)
    assert (exact.token_bytes[specials] == 0).all()
    assert [batch.tolist() for batch in exact.encode_batch([text, ""])] == [ids.tolist(), []]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
@example(TEXT)
@example("<|endoftext|> 🎉🎉  e\u0301\u0301\n")
def test_offsets_name_the_characters_of_each_token(exact, text):
    ids, starts, ends = exact.encode_with_offsets(text)
    assert ids.tolist() == exact.encode(text).tolist()
    assert {values.dtype for values in (ids, starts, ends)} == {np.dtype(np.int32)}
    character_of = [place for place, character in enumerate(text) for _ in character.encode()]
    behind = np.cumsum(exact.token_bytes[ids]).tolist()
    for token, start, end, stop in zip(ids, starts.tolist(), ends.tolist(), behind):
        first = stop - len(exact.pieces[token])
        assert (start, end) == (character_of[first], character_of[stop - 1] + 1)


@settings(deadline=None)
@given(words=st.lists(st.text("the stazSTé数🎉", min_size=1).filter(lambda word: " " not in word), min_size=1))
def test_sentencepiece_offsets_name_the_characters_of_each_token(sentencepiece, words):
    text = " ".join(words)
    ids, starts, ends = sentencepiece.encode_with_offsets(text)
    assert ids.tolist() == sentencepiece.encode(text).tolist() and starts.dtype == ends.dtype == np.int32
    assert (np.diff(starts) >= 0).all() and (starts < ends).all() and ends[-1] == len(text)
    assert all(sentencepiece.pieces[i].strip() in text[a:b].encode() for i, a, b in zip(ids, starts, ends))


def test_sentencepiece_offsets_are_those_before_normalising(sentencepiece):
    text = "  e\ufb01  é"  # a ligature that becomes two letters, and spaces that become one
    ids, starts, ends = sentencepiece.encode_with_offsets(text)
    found = {(sentencepiece.pieces[i].strip(), text[a:b].strip()) for i, a, b in zip(ids, starts, ends)}
    assert all(b"f" not in piece or "\ufb01" in place for piece, place in found)
    assert any(b"i" in piece and "\ufb01" in place for piece, place in found)
    assert {(b"\xc3", "é"), (b"\xa9", "é")} <= found
    assert [len(values) for values in sentencepiece.encode_with_offsets("")] == [0, 0, 0]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")), data=st.data())
def test_streaming_gives_whole_characters_and_all_of_them(exact, text, data):
    decoder = tokenizers.StreamDecoder(exact)
    parts = [decoder.push(token) for token in exact.encode(text)]
    assert "".join(parts) + decoder.finish() == text
    assert all(part in text for part in parts)


def test_streaming_holds_back_half_a_character():
    decoder = tokenizers.StreamDecoder(tokenizers.make("bytes"))
    assert [decoder.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"


@given(ids=st.lists(st.integers(0, 400)))
def test_decode_never_raises(ids):
    assert isinstance(tokenizers.make("bytes").decode(ids), str)


def test_vocabulary_size(trained):
    assert trained.vocab_size == 600 == len(trained.token_bytes)
    assert trained.bos == trained.eos == trained.pad == 599
    assert tokenizers.make("bytes").vocab_size == 257


def test_bpe_keeps_indentation_and_cuts_long_numbers(trained):
    from tokenizers import Tokenizer

    cut = Tokenizer.from_str(json.loads(trained.to_json())["model"]).pre_tokenizer.pre_tokenize_str
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in cut("if x:\n        return 1234567 + it's")]
    assert words == ["if", " x", ":\n", "       ", " return", " ", "123", "456", "7", " +", " it", "'s"]


def test_bpe_is_deterministic_and_cached(trained, documents, data_dir, monkeypatch):
    assert bpe.train([documents], 599) == bpe.train([documents], 599)
    monkeypatch.setattr(bpe, "train", lambda *_: pytest.fail("trained again"))
    assert tokenizers.make("bpe", vocab_size=600, documents=[documents]).fingerprint == trained.fingerprint
    with pytest.raises(pytest.fail.Exception):
        tokenizers.make("bpe", vocab_size=601, documents=documents)


def test_stored_and_made_again(exact, sentencepiece):
    for tokenizer in (exact, sentencepiece):
        for again in (tokenizers.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
            assert again.fingerprint == tokenizer.fingerprint
            assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
            assert (again.vocab_size, again.bos, again.eos, again.pad) == (
                tokenizer.vocab_size,
                tokenizer.bos,
                tokenizer.eos,
                tokenizer.pad,
            )
            assert np.array_equal(again.token_bytes, tokenizer.token_bytes)


def test_fingerprints_differ(trained, huggingface, sentencepiece):
    made = [tokenizers.make("bytes"), trained, huggingface[0], sentencepiece]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 4


def test_tokens_are_the_same_whatever_opens_and_ends_a_text(trained, huggingface, sentencepiece):
    tokenizer, _ = huggingface
    other = tokenizers.from_json(json.dumps(json.loads(tokenizer.to_json()) | {"bos": 3, "eos": 4}))
    assert other.splits_like(tokenizer) and other.fingerprint != tokenizer.fingerprint
    for one, two in itertools.combinations((trained, tokenizer, sentencepiece), 2):
        assert one.splits_like(one) and not one.splits_like(two)


def test_huggingface_specials_by_usual_name(huggingface):
    tokenizer, _ = huggingface
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad, tokenizer.vocab_size) == (500, 501, 500, 502)
    assert len(tokenizer.encode(TEXT)) > 9  # neither cut nor padded, whatever the file says


def test_huggingface_specials_by_configuration(huggingface, tmp_path):
    (tmp_path / "tokenizer.json").write_text((huggingface[1] / "tokenizer.json").read_text())
    configuration = tmp_path / "tokenizer_config.json"
    configuration.write_text(json.dumps({"eos_token": {"content": "<s>"}, "bos_token": None}))
    tokenizer = tokenizers.make("huggingface", path=str(tmp_path / "tokenizer.json"))
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad) == (501, None, 501)
    configuration.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(UserError, match="no end token"):
        tokenizers.make("huggingface", path=str(tmp_path))


def test_wordpiece_and_its_spaces(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "[SEP]": 1, "un": 2, "##ion": 3, "state": 4}
    library = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["[UNK]", "[SEP]"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.make("huggingface", path=str(tmp_path))
    ids = tokenizer.encode("state union")
    assert ids.tolist() == [4, 2, 3] and tokenizer.decode(ids) == "state union"
    assert tokenizer.token_bytes.tolist() == [0, 0, 3, 3, 6]
    ids, starts, ends = tokenizer.encode_with_offsets("state  union.")
    assert [(int(i), "state  union."[a:b]) for i, a, b in zip(ids, starts, ends)] == [
        (4, "state"), (2, "un"), (3, "ion"), (0, "."),
    ]  # fmt: skip


def test_offsets_keep_the_space_that_a_file_would_have_trimmed(huggingface, tmp_path):
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_file(str(huggingface[1] / "tokenizer.json"))
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    library.save(str(tmp_path / "tokenizer.json"))
    ids, starts, ends = tokenizers.make("huggingface", path=str(tmp_path)).encode_with_offsets(TEXT)
    covered = {place for start, end in zip(starts, ends) for place in range(start, end)}
    assert covered == set(range(len(TEXT)))
    assert ids.tolist() == huggingface[0].encode(TEXT).tolist()


def test_sentencepiece(sentencepiece):
    text = "The State of the Union in 1790: 数"
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    assert sentencepiece.token_bytes[ids].sum() == len(text.encode()) + 1  # the space it puts before
    decoder = tokenizers.StreamDecoder(sentencepiece)
    assert "".join(decoder.push(token) for token in ids) == " " + text
    assert sentencepiece.token_bytes[[sentencepiece.bos, sentencepiece.eos, 0]].sum() == 0


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bite", {}, "unknown tokenizer kind 'bite'; did you mean 'bytes'"),
        ("bpe", {"vocab_size": 600}, "needs the documents"),
        ("huggingface", {}, "needs a path"),
        ("sentencepiece", {"path": "/nowhere/x.model"}, "/nowhere/x.model does not exist"),
    ],
)
def test_wrong_arguments(kind, settings, message):
    with pytest.raises(UserError, match=message):
        tokenizers.make(kind, **settings)


def test_bpe_of_a_wrong_size(documents, tmp_path):
    with pytest.raises(UserError, match="vocab_size >= 257.*not 100"):
        tokenizers.make("bpe", vocab_size=100, documents=documents)
    (tmp_path / "little.txt").write_text("a little text")
    little = sources.load(f"text:{tmp_path}/little.txt", "all")
    with pytest.raises(UserError, match="too little text for a BPE of 5000 tokens"):
        tokenizers.make("bpe", vocab_size=5000, documents=little, data_dir=tmp_path)
    assert not list(tmp_path.glob("tokenizers/*"))  # nothing half-made is cached


@pytest.mark.parametrize(
    ("kind", "what"), [("huggingface", "no tokenizer.json"), ("sentencepiece", "no SentencePiece")]
)
def test_a_file_that_is_no_tokenizer(tmp_path, kind, what):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match=what) as raised:
        tokenizers.make(kind, path=str(tmp_path / "file"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kind": "new"}', '{"kind": "bpe"}', "[]"])
def test_a_damaged_store_is_an_error(text):
    with pytest.raises(UserError, match="stored tokenizer cannot be read"):
        tokenizers.from_json(text)
