"""Documents as tokens: cached or not they are the same, and a cache is never half there."""

import pickle

import numpy as np
import pytest

from fastlm.data import pipeline, sources, tokenized, tokenizers
from fastlm.data.documents import Documents, digest
from fastlm.errors import UserError

TOKENIZER = tokenizers.make("bytes")


class Texts(Documents):
    """Documents from a list."""

    def __init__(self, texts):
        self.texts, self.name = texts, "texts"
        self.fingerprint, self.num_bytes = digest(*texts), sum(map(len, texts))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]


TEXTS = Texts(["one", "", "two é", "\n", "three " * 100])


def test_cached_and_not_cached_are_the_same(tmp_path):
    online = tokenized.TokenizedDocuments(TEXTS, TOKENIZER)
    cached = tokenized.CachedDocuments(TEXTS, TOKENIZER, tmp_path)
    assert len(online) == len(cached) == 5
    for index in range(5):
        assert online[index].tolist() == cached[index].tolist()
    assert cached[0].tolist() == [256, *b"one", 256]
    assert len(cached[1]) == 0  # no text: no document
    assert cached.lengths.tolist() == [5, 0, 8, 3, 602]
    assert np.array_equal(pickle.loads(pickle.dumps(cached))[2], cached[2])


def test_the_cache_is_used(tmp_path, monkeypatch):
    tokenized.CachedDocuments(TEXTS, TOKENIZER, tmp_path)
    monkeypatch.setattr(tokenized, "encode_documents", lambda *_: pytest.fail("tokenized again"))
    assert tokenized.CachedDocuments(TEXTS, TOKENIZER, tmp_path)[0].tolist() == [256, *b"one", 256]
    with pytest.raises(pytest.fail.Exception):
        tokenized.CachedDocuments(Texts(["other"]), TOKENIZER, tmp_path)


def test_an_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    class Broken(Texts):
        def __getitem__(self, index):
            if index == 3:
                raise UserError("document 3 is bad")
            return super().__getitem__(index)

    monkeypatch.setattr(tokenized, "_BATCH_BYTES", 1)
    with pytest.raises(UserError, match="document 3 is bad"):
        tokenized.CachedDocuments(Broken(TEXTS.texts), TOKENIZER, tmp_path)
    assert not list(tmp_path.rglob("*.npy")) and not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_tokens_fit_their_type(vocab_size, dtype):
    assert tokenized._token_dtype(vocab_size) is dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has 2 document\(s\) but no text"):
        tokenized.tokenize(Texts(["", ""]), TOKENIZER, tmp_path)


def test_batches_do_not_depend_on_the_cache(tmp_path, monkeypatch):
    """Too much text to cache is tokenized on the fly, in the same order if it fits a block."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(30)))
    spec = f"jsonl:{tmp_path}/a.jsonl"

    def three():
        settings = {"split": "all", "length": 16, "batch_size": 4, "seed": 1, "prefetch": 0}
        iterator = pipeline.training_batches(spec, TOKENIZER, data_dir=tmp_path, **settings)
        return [next(iterator)["tokens"] for _ in range(3)]

    online = None
    with monkeypatch.context() as patch:
        patch.setattr(tokenized, "CACHE_LIMIT", 10)
        online = three()
        assert not (tmp_path / "tokens").exists()
    assert np.array_equal(online, three())
    assert (tmp_path / "tokens").exists()
    assert sources.load(spec, "all").num_bytes > 10
