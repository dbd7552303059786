"""What tasks make of texts is what the tokenizer a model came with makes of them, special tokens and all."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastlm.data import tokenizers
from fastlm.data.settings import Data
from fastlm.data.tokenizers.huggingface import HuggingFaceTokenizer
from fastlm.models import ModelConfig
from fastlm.tasks import cloze
from fastlm.tasks.context_windows import Windowing
from fastlm.tasks.rows import Joiner, reading_fingerprint, row_layout
from fastlm.tasks.sequence_to_sequence import SequenceToSequence

SPECIAL = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3, "<unk>": 4}
WORDS = "abcdefghij"


def template(single, pair):
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(SPECIAL.items()))


BERT = template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
PROCESSORS = {
    "bert": BERT,
    "old bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    "bart": template("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": template("$A </s>", "$A </s> $B </s>"),
    "llama": processors.Sequence([processors.ByteLevel(), template("<s> $A", "<s> $A <s>:1 $B:1")]),
    "xlnet": template("$A [SEP] [CLS]:2", "$A [SEP] $B:1 [SEP]:1 [CLS]:2"),
}
QUESTIONS = {name: processor for name, processor in PROCESSORS.items() if name != "llama"}
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def library_of(processor):
    vocabulary = SPECIAL | {word: len(SPECIAL) + number for number, word in enumerate(WORDS)}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.add_special_tokens(list(SPECIAL))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if processor is not None:
        library.post_processor = processor
    return library


def tokenizer_of(processor, **special):
    special = {"bos": None, "eos": 1, "pad": 1} | special
    return HuggingFaceTokenizer(library_of(processor).to_str(), kind="huggingface", **special)


def same(made, encoding):
    tokens, types = made[:2]
    assert tokens.tolist() == encoding.ids and types.tolist() == encoding.type_ids
    assert tokens.dtype == types.dtype == np.int32


@pytest.mark.parametrize("name", PROCESSORS)
@given(first=TEXT, second=TEXT, even=st.integers(1, 6))
def test_rows_are_what_the_library_makes_of_one_text_and_of_two(name, first, second, even):
    library = library_of(PROCESSORS[name])
    tokenizer = tokenizers.from_json(tokenizer_of(PROCESSORS[name]).to_json())  # as a checkpoint keeps it
    same(Joiner(tokenizer, 99)(first), library.encode(first))
    same(Joiner(tokenizer, 99)(first, second), library.encode(first, second))
    for texts in ((first,), (first, second)):
        length = row_layout(tokenizer, len(texts)).size + 2 * even
        library.enable_truncation(length)
        same(Joiner(tokenizer, length)(*texts), library.encode(*texts))


@pytest.mark.parametrize("name", QUESTIONS)
@given(question=TEXT, context=TEXT)
def test_windows_are_what_the_library_makes_of_question_and_context(name, question, context):
    library, windowing = library_of(QUESTIONS[name]), Windowing(tokenizer_of(QUESTIONS[name]), 28, 1)
    library.enable_truncation(28, strategy="only_second")
    encoding = library.encode(question, context)
    first, *more = [windowing.window(question, context, start) for start in windowing.firsts(question, context)]
    same((first.tokens, first.token_types), encoding)
    inside = [place for place, number in enumerate(encoding.sequence_ids) if number == 1]
    assert list(range(first.context_first, first.context_stop)) == inside
    parts = [w.tokens[w.context_first : w.context_stop][-1] for w in (first, *more) if context]
    assert not parts or parts[-1] == library.encode(context, add_special_tokens=False).ids[-1]


@pytest.mark.parametrize("name", PROCESSORS)
@given(source=TEXT, target=TEXT)
def test_an_encoder_reads_sources_as_it_was_trained_to(name, source, target):
    library, tokenizer = library_of(PROCESSORS[name]), tokenizer_of(PROCESSORS[name])
    kind = SequenceToSequence(start=1, prefix="j ")
    cfg = ModelConfig(family="encoder_decoder", encoder_layers=1, vocab_size=20)
    row = kind.encoder(cfg, tokenizer, Data(sources=(), length=99))({"source": source, "target": target})
    encoding = library.encode("j " + source)
    assert row["source"].tolist() == encoding.ids == kind.writing(cfg, tokenizer).read(source).tolist()
    room = row_layout(tokenizer, 1).size + 2
    library.enable_truncation(room)
    cut = kind.encoder(cfg, tokenizer, Data(sources=(), length=room))({"source": source, "target": target})
    assert cut["source"].tolist() == library.encode("j " + source).ids
    assert max(len(cut[name]) for name in ("tokens", "targets")) <= room
    assert row["tokens"].tolist() == [1, *row["targets"][:-1]]
    library.no_truncation()
    if name in ("roberta", "bart", "t5"):
        assert row["targets"].tolist() == library.encode(target).ids


def test_what_opens_a_target_stands_there_once():
    cfg = ModelConfig(family="encoder_decoder", encoder_layers=1, vocab_size=20)
    encode = SequenceToSequence().encoder(cfg, tokenizer_of(PROCESSORS["bart"], bos=0), Data(sources=(), length=9))
    row = encode({"source": "a", "target": "b"})
    assert (row["tokens"].tolist(), row["targets"].tolist()) == ([0, 6], [6, 1])


def test_a_tokenizer_that_says_nothing_is_read_as_bert_is(caplog):
    for processor in (None, processors.ByteLevel()):
        tokenizer = tokenizer_of(processor)
        assert tokenizer.layout(1) is None and reading_fingerprint(tokenizer) == tokenizer.fingerprint
        same(Joiner(tokenizer, 9)("a", "b"), library_of(BERT).encode("a", "b"))
    with caplog.at_level(logging.WARNING):
        turned = tokenizer_of(template("[CLS] $A", "$B [SEP] $A"))
    assert turned.layout(2) is None and "turns them round" in caplog.text


def test_encoded_rows_are_told_apart_by_their_special_tokens():
    bert, roberta = (tokenizer_of(PROCESSORS[name]) for name in ("bert", "roberta"))
    assert len({t.fingerprint for t in (bert, roberta)} | {reading_fingerprint(t) for t in (bert, roberta)}) == 4


def test_special_tokens_beyond_the_vocabulary_count():
    far = json.loads(tokenizer_of(PROCESSORS["roberta"]).to_json())
    model = json.loads(far["model"])
    model["post_processor"]["cls"] = ["<s>", 77]
    assert tokenizers.from_json(json.dumps(far | {"model": json.dumps(model)})).vocab_size == 78


@pytest.mark.parametrize("name", QUESTIONS)
def test_cloze_questions_keep_the_special_tokens_of_their_row(name):
    tokenizer = tokenizer_of(QUESTIONS[name])
    layout, gap = row_layout(tokenizer, 2), jnp.asarray(tokenizer.encode("j"))
    window = Windowing(tokenizer, 28, 0).window("a b c d", "e f g h i a b c d e", 0)
    row = {
        "tokens": np.pad(window.tokens, (0, 5)),
        "tokens_length": len(window.tokens),
        "context_first": window.context_first,
        "context_stop": window.context_stop,
        "answer_first": 0,
        "answer_last": 0,
    }
    batch = {field: jnp.asarray([value] * 20) for field, value in row.items()}
    made = jax.tree.map(np.asarray, cloze.ask(batch, jax.random.key(0), gap, layout, 1.0))
    assert len(set(made["tokens_length"].tolist())) > 1, "contexts are cut"
    opening, between, _ = map(len, layout.special)
    library = library_of(QUESTIONS[name])
    fields = ("tokens", "tokens_length", "context_first", "context_stop")
    for tokens, length, first, stop in zip(*(made[field] for field in fields)):
        parts = (tokens[opening : first - between], tokens[first:stop])
        question, context = (" ".join(map(library.id_to_token, part)) for part in parts)
        assert tokens[:length].tolist() == library.encode(question, context).ids
        assert "j" in question and not tokens[length:].any()
