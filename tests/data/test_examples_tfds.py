"""Rows of TFDS data sets: nested features, what is left out, and the data sets that come with the project."""

import ast
import collections
import itertools
import logging
import pickle

import numpy as np
import pytest

from fastlm.data import examples, sources
from fastlm.data.builders import old_testament, python_docstrings, python_stdlib, question_rules, synthetic_questions
from fastlm.errors import UserError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A data directory with a data set in the shape of SQuAD, and odd features besides."""
    import tensorflow_datasets as tfds

    features = tfds.features

    class Nested(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            answers = features.Sequence({"text": features.Text(), "answer_start": features.Scalar(dtype=np.int32)})
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {
                        "question": features.Text(),
                        "label": features.ClassLabel(names=["no", "yes"]),
                        "score": features.Scalar(dtype=np.float32),
                        "sure": features.Scalar(dtype=np.bool_),
                        "answers": answers,
                        "pair": features.FeaturesDict(
                            {"en": features.Text(), "more": {"n": features.Scalar(np.int64)}}
                        ),
                        "vector": features.Tensor(shape=(3,), dtype=np.float32),
                    }
                ),
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(range(5)), "validation": self._generate_examples(range(5, 7))}

        def _generate_examples(self, numbers):
            for n in numbers:
                answers = {"text": ["é", "b"][: n % 3], "answer_start": [3, 4][: n % 3]}
                pair = {"en": f"en {n}", "more": {"n": n}}
                yield (
                    n,
                    {
                        "question": f"q {n}",
                        "label": n % 2,
                        "score": n / 2,
                        "sure": n == 1,
                        "answers": answers,
                        "pair": pair,
                        "vector": np.ones(3, np.float32),
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    Nested(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_nested_features_are_fields(nested, caplog):
    with caplog.at_level(logging.INFO):
        rows = examples.load("nested", "train", data_dir=nested)
    assert "left out of the fields of nested, being no text or number: vector" in caplog.text
    assert rows.name == "nested/train" and len(rows) == 5
    assert rows.fields == (
        "answers/answer_start",
        "answers/text",
        "label",
        "pair/en",
        "pair/more/n",
        "question",
        "score",
        "sure",
    )
    by_number = {row["pair/more/n"]: row for row in rows}
    assert by_number[1] == {
        "answers/answer_start": 3,
        "answers/text": "é",
        "label": 1,
        "pair/en": "en 1",
        "pair/more/n": 1,
        "question": "q 1",
        "score": 0.5,
        "sure": 1,
    }
    assert {type(value) for value in by_number[1].values()} == {int, str, float}
    assert by_number[2]["answers/text"] == "é" and by_number[2][examples.every("answers/text")] == ("é", "b")
    assert not set(rows.fields) & set(map(examples.every, rows.fields))
    assert by_number[3]["answers/text"] == "" and by_number[3]["answers/answer_start"] == -1
    assert rows.get([4, 0]) == [rows[4], rows[0]] and rows.get([]) == []
    assert pickle.loads(pickle.dumps(rows))[2] == rows[2]


def test_splits_of_a_data_set(nested):
    validation = examples.load("nested", "validation", data_dir=nested)
    assert len(validation) == 2 and len(examples.load("nested", "validation[:50%]", data_dir=nested)) == 1
    assert validation.fingerprint == examples.load("nested", "validation", data_dir=nested).fingerprint
    assert validation.fingerprint != examples.load("nested", "train", data_dir=nested).fingerprint
    with pytest.raises(UserError, match=r"has no split 'test' \(it has: train, validation\)"):
        examples.load("nested", "test", data_dir=nested)


@pytest.mark.parametrize("name", ["squad", "glue/sst2"])
def test_a_public_data_set_not_on_disk_names_the_command(name, tmp_path):
    with pytest.raises(UserError) as raised:
        examples.load(name, "train", data_dir=tmp_path)
    assert f"python -m fastlm.data.prepare {name} --data_dir {tmp_path}" in str(raised.value)
    assert "tsv:GLOB, csv:GLOB or jsonl:GLOB" in str(raised.value) and not list(tmp_path.iterdir())


def test_old_testament_pairs(tmp_path, monkeypatch):
    """A few verses of each split; all of them take seconds to prepare."""
    everything = old_testament.verses
    monkeypatch.setattr(old_testament, "verses", lambda split: itertools.islice(everything(split), 20))
    rows = examples.load("old_testament_en_es", "train", data_dir=tmp_path)
    assert rows.fields == ("book", "chapter", "en", "es", "verse") and len(rows) == 20
    (first,) = [row for row in rows if row["verse"] == 1]
    assert first["book"] == "Genesis" and first["en"].startswith("In the beginning, God created")
    assert first["es"].startswith("EN el principio crió Dios")
    assert {row["book"] for row in examples.load("old_testament_en_es", "test", data_dir=tmp_path)} == {"Judges"}
    # The same data set is a source of documents, one field at a time.
    assert sorted(sources.load("old_testament_en_es#es", "train", data_dir=tmp_path)) == sorted(r["es"] for r in rows)


SOURCE = '''
import os

def spaced(a,
           b="x"):  # why
    # before
    """Does a thing
    twice, with "quotes".

    And more.
    """

    text = """
    kept"""
    return text

class Thing(object):
    @property
    def size(self):
        r"""The size, with \\ and """ + ""
        return 1

    async def method(self, *args):
        \'\'\'Runs with """ inside \\n and a trailing "quote"\'\'\'
        def inner():
            """Nested ones are left out."""
            return 2
        return inner()

    def dedented(self):
        """A string would lose its indentation."""
        return """
        lost"""

def one_line(): """Has nothing but this docstring."""

def same_line():
    """Shares its line with code."""; return 1

def bare():
    """Only a docstring here."""

def terse():
    """Two words."""
    return 1

def undocumented():
    return 1
'''


def test_documented_functions():
    found = {row.name: row for row in python_docstrings.documented_functions(SOURCE)}
    assert set(found) == {"spaced", "Thing.method"}
    spaced, method = found["spaced"], found["Thing.method"]
    assert spaced.docstring == 'Does a thing twice, with "quotes".'
    header = 'def spaced(a,\n           b="x"):  # why\n    # before\n'
    assert spaced.prompt == f'{header}    """Does a thing twice, with "quotes"."""\n'
    assert spaced.body == '\n    text = """\n    kept"""\n    return text\n'
    assert spaced.function == header + spaced.body
    assert method.function.startswith("async def method(self, *args):\n    def inner():\n")
    (node,) = ast.parse(method.prompt + method.body).body
    assert " ".join(ast.get_docstring(node).split()) == method.docstring


def test_standard_library_prompts_and_bodies_are_the_functions(monkeypatch):
    """Some files of each split; the slow test has all."""
    files = python_stdlib.files
    monkeypatch.setattr(python_stdlib, "files", lambda split: itertools.islice(files(split), 8))
    rows = python_docstrings.rows_by_split()
    assert all(len(rows[split]) > 10 for split in SPLITS)
    check_functions(rows)


def check_functions(rows):
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {row["path"] for row in rows[one]} & {row["path"] for row in rows[other]}
        assert not {row["function"] for row in rows[one]} & {row["function"] for row in rows[other]}
    for row in itertools.chain(*rows.values()):
        assert row["function"].endswith(row["body"]) and len(row["function"]) <= 1500
        assert row["prompt"].startswith(row["function"].removesuffix(row["body"]))
        (node,) = ast.parse(row["prompt"] + row["body"]).body
        assert " ".join(ast.get_docstring(node).split()) == row["docstring"]
        (bare,) = ast.parse(row["function"]).body
        assert [ast.dump(part) for part in bare.body] == [ast.dump(part) for part in node.body[1:]]


def test_questions_are_answered_where_they_say():
    """All of test: each answer stands where it says, once, and not in the question."""
    rows = list(synthetic_questions.rows("test"))
    assert len(rows) > 500
    for row in rows:
        assert row["context"][row["answer_start"] :].startswith(row["answer"])
        assert row["context"].count(row["answer"]) == 1 and row["answer"] not in row["question"]
        assert row["question"].endswith("?") and row["synthetic"] == 1 and 400 <= len(row["context"]) <= 900
    assert len({row["kind"] for row in rows}) >= 8 and {row["kind"] for row in rows} <= set(question_rules.KINDS)
    assert len({row["question"] for row in rows}) > 0.97 * len(rows)
    assert 0.2 < sum("___" not in row["question"] for row in rows) / len(rows) < 0.8


def test_questions_cannot_be_answered_without_reading_them():
    rows = list(synthetic_questions.rows("validation"))
    answers = collections.defaultdict(set)
    firsts = 0
    for row in rows:
        answers[row["context"]].add(row["answer_start"])
        of_kind = [span.start for span in question_rules.spans(row["context"]) if span.kind == row["kind"]]
        assert len(of_kind) > 1
        firsts += min(of_kind) == row["answer_start"]
    assert firsts < 0.4 * len(rows)  # the first span of the kind asked for
    assert sum(map(len, answers.values())) == len(rows) > 1.4 * len(answers)  # questions of one context differ


SENTENCES = [
    "The treaty with Spain was signed on May 4, 1819, after long talks.",
    "Mr. Adams reported that the sinking fund was at $1,250,000 in those days.",
    "In 1820 the lighthouse at the harbor of Mobile was built by 45 men.",
]


def questions(sentence, context):
    spans = question_rules.spans(sentence)
    return list(question_rules.questions(sentence, spans, context, context.index(sentence)))


def test_question_rules():
    context = " ".join(SENTENCES)
    assert question_rules.sentences(context) == SENTENCES
    asked = {(question.kind, question.answer) for sentence in SENTENCES for question in questions(sentence, context)}
    assert asked == {
        ("country", "Spain"),
        ("date", "May 4, 1819"),
        ("person", "Mr. Adams"),
        ("amount", "$1,250,000"),
        ("year", "1820"),
        ("number", "45"),
        ("city", "Mobile"),
    }
    asked = [q.question for q in questions(SENTENCES[1], context) if q.kind == "amount"]
    assert any("the sinking fund" in question and "___" not in question for question in asked)
    assert any("fund was at ___ in those days" in question for question in asked)


def test_a_topic_of_two_sentences_is_no_topic():
    context = "The public debt was $5,000,000 in all that while. The public debt was $6,000,000 after it."
    found = questions(context[:48], context)
    assert all("___" in question.question for question in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("old_testament_en_es", 20000), ("python_docstrings", 3500), ("synthetic_questions", 5000)]
)
def test_built_in_data_sets_whole(name, least):
    rows = {split: examples.load(name, split) for split in SPLITS}
    rows = {split: part.get(range(len(part))) for split, part in rows.items()}
    assert len(rows["train"]) >= least and len(rows["test"]) >= 400 and len(rows["validation"]) >= 300
    assert all(value != "" for row in itertools.chain(*rows.values()) for value in row.values())
    if name == "python_docstrings":
        check_functions(rows)
