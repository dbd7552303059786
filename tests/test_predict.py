"""`python -m fastlm.predict`: on models of each kind that answers, as they come from elsewhere."""

import json

import numpy as np
import pytest

from fastlm import tasks
from fastlm.decoding import beam
from fastlm.parallel import mesh as meshes
from fastlm.tasks.masked_language_modeling import CHOICES, fill
from fastlm.training import restore
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import copied, options_of, store, tensors_of, with_options, with_tokenizer


@pytest.fixture(autouse=True)
def leave_no_mesh(no_mesh):
    pass


def converted(case, path, *arguments, **configuration):
    folder = with_tokenizer(copied(case, path / case), configuration)
    outcome = call("convert", "--from", folder, "--to", path / "run", *arguments)
    assert outcome.status == 0, outcome.err
    return path / "run"


def answers(workdir, *arguments):
    outcome = call("predict", "--workdir", workdir, *arguments)
    assert outcome.status == 0, outcome.err
    assert not outcome.err, "nothing but answers"
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_a_classifier_names_labels_of_texts_and_files(tmp_path):
    workdir = converted("bert_classifier", tmp_path)
    given = answers(workdir, "--text", "a cab", "--text", "bed")
    assert [answer["text"] for answer in given] == ["a cab", "bed"]
    labels = json.loads((tmp_path / "bert_classifier" / "config.json").read_text())["id2label"].values()
    assert all(answer["said"] in labels and 1 / 3 <= answer["probability"] <= 1 for answer in given)
    (tmp_path / "rows.tsv").write_text("text\tother\na cab\t1\nbed\t2\n")
    alike = lambda ones: [one | {"probability": pytest.approx(one["probability"], rel=1e-5)} for one in ones]
    assert answers(workdir, "--rows", f"tsv:{tmp_path}/rows.tsv", "--batch_size", "1") == alike(given)
    assert answers(workdir, "--row", '{"text": "bed"}') == alike(given[1:])


def test_one_number_is_an_estimate(tmp_path):
    folder = with_tokenizer(copied("bert_model", tmp_path / "model"), {})
    arguments = ["--from", folder, "--to", tmp_path / "run", "--head", "sequence", "--classes", "1"]
    assert call("convert", *arguments).status == 0
    one, other = answers(tmp_path / "run", "--text", "a cab", "--text", "bed")
    assert isinstance(one["said"], float) and one["said"] != other["said"]


def test_spans_stand_in_their_context(tmp_path):
    workdir = converted("bert_spans", tmp_path)
    row = {"question": "who", "context": "a cab fed a bee"}
    (answer,) = answers(workdir, "--row", json.dumps(row))
    assert answer["said"] in row["context"] and answer["said"] and answer["question"] == "who"
    refuses("--text: this task reads question and context", "predict", "--workdir", workdir, "--text", "a")
    refuses(
        "must be a JSON object with question, context", "predict", "--workdir", workdir, "--row", '{"context": "a"}'
    )
    refuses("'context' must be a text", "predict", "--workdir", workdir, "--row", '{"question": "a", "context": null}')
    refuses("is no JSON", "predict", "--workdir", workdir, "--row", "{")


@pytest.mark.parametrize("classes", [2, 9])
def test_a_model_that_tags_tokens_answers_no_questions(classes, tmp_path):
    folder = with_tokenizer(copied("bert_spans", tmp_path / "model"), {})
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith("qa_outputs")}
    head = {"weight": np.zeros((classes, 32), np.float32), "bias": np.zeros(classes, np.float32)}
    store(folder, tensors | {f"classifier.{name}": tensor for name, tensor in head.items()})
    tags = {str(i): f"TAG{i}" for i in range(classes)}
    with_options(folder, architectures=["BertForTokenClassification"], id2label=tags)
    outcome = call("convert", "--from", folder, "--to", tmp_path / "run")
    assert "no task here asks a model with this 'tokens' head" in outcome.out
    row = '{"question": "who", "context": "a cab"}'
    refuses("fine-tune it", "predict", "--workdir", tmp_path / "run", "--row", row)
    assert call("convert", "--from", tmp_path / "run", "--to", tmp_path / "back").status == 0
    assert options_of(tmp_path / "back")["id2label"] == tags
    assert options_of(tmp_path / "back")["architectures"] == ["BertForTokenClassification"]


@pytest.mark.slow
def test_an_encoder_decoder_writes_for_each_row(tmp_path):
    workdir = converted("marian", tmp_path, "--max_length", "16")
    one, other = answers(workdir, "--row", '{"source": "abc"}', "--text", "a cab")
    assert [one["source"], other["source"]] == ["a cab", "abc"]
    restored = restore.restore(workdir, meshes.make())
    kind = tasks.make_kind(restored.about["config"]["task"])
    writing = kind.writing(restored.model.cfg, restored.tokenizer)
    most = restored.model.cfg.max_length - 1
    found = beam.search(
        restored.model,
        restored.params,
        [writing.read("abc")],
        max_tokens=most,
        beams=kind.beams,
        start=writing.start,
        end=2,
        **writing.rules,
    )
    assert other["said"] == restored.tokenizer.decode(found[0][0].tokens)


def test_words_for_holes(tmp_path):
    workdir = converted("bert_masked", tmp_path)
    (answer,) = answers(workdir, "--text", "a [MASK] b [MASK]")
    assert [len(hole) for hole in answer["said"]] == [CHOICES, CHOICES]
    restored = restore.restore(workdir, meshes.make())
    filled = fill(restored.model, restored.params, restored.tokenizer, "a [MASK] b [MASK]")
    chances = [choice["probability"] for choice in filled["said"][0]]
    assert chances == sorted(chances, reverse=True) and 0 < sum(chances) < 1
    np.testing.assert_allclose(chances, [choice["probability"] for choice in answer["said"][0]], rtol=1e-4)
    refuses("has no [MASK] to fill", "predict", "--workdir", workdir, "--text", "a b")
    refuses("the model's context", "predict", "--workdir", workdir, "--text", "[MASK]" + " a" * 40)


def test_embeddings_have_length_one_and_do_not_depend_on_their_neighbours(tmp_path):
    workdir = converted("bert_model", tmp_path)
    one, long = answers(workdir, "--text", "a cab", "--text", "a bed b c d e f")
    (alone,) = answers(workdir, "--text", "a cab")
    np.testing.assert_allclose(np.linalg.norm(one["said"]), 1.0, rtol=1e-4)
    np.testing.assert_allclose(one["said"], alone["said"], atol=1e-5)
    assert np.dot(one["said"], long["said"]) < 0.999
    refuses("embeddings have no score of their own", "evaluate", "--workdir", workdir, "--source", "jsonl:x")


def test_what_answers_nothing(tmp_path):
    workdir = converted("llama", tmp_path)
    refuses("continues texts and answers none", "predict", "--workdir", workdir, "--text", "a")
    refuses("nothing to read, or too much", "predict", "--workdir", workdir)
    refuses("the text is not valid UTF-8", "predict", "--workdir", workdir, "--text", "a\udcff")
