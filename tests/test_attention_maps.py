"""`python -m fastlm.evaluate --attention_maps` on models of each family."""

import dataclasses
import json

import pytest

from fastlm.data.settings import Data
from fastlm.parallel import mesh as meshes
from fastlm.reports.token_names import token_names
from fastlm.tasks.sequence_to_sequence import SequenceToSequence
from fastlm.training import restore
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import BERT, copied, with_tokenizer


@pytest.fixture(autouse=True)
def leave_no_mesh(no_mesh):
    pass


def converted(case, path, *arguments, **configuration):
    folder = with_tokenizer(copied(case, path / case), configuration, BERT if case.startswith("bert") else None)
    outcome = call("convert", "--from", folder, "--to", path / "run", *arguments)
    assert outcome.status == 0, outcome.err
    return path / "run"


def maps(workdir, folder, *arguments):
    outcome = call("evaluate", "--workdir", workdir, "--attention-maps", "--maps-folder", folder, *arguments)
    assert outcome.status == 0, outcome.err
    return json.loads((folder / "attention.json").read_text()), outcome.out


def test_a_decoder_and_what_it_refuses(tmp_path):
    workdir = converted("llama", tmp_path)
    (tmp_path / "text.txt").write_text("a cab feeds a bad dad")
    found, said = maps(workdir, tmp_path / "maps", "--text_file", tmp_path / "text.txt", "--map_tokens", "7")
    assert len(found["tokens"]["tokens"]) == 7 and "The text is cut: 7 of " in found["notice"]
    assert found["notice"] in said and "attention.html" in said
    layers = len(list((tmp_path / "maps").glob("decoder_*.png")))
    assert layers == len(found["maps"]) > 1
    assert all(0 <= value < 7 for one in found["maps"] for value in one["distance"])

    asking = ["evaluate", "--workdir", workdir, "--attention_maps"]
    refuses("the text is empty", *asking, "--text", " ")
    refuses("the text is not valid UTF-8", *asking, "--text", "a\udcff")
    refuses("this task reads one text, got 2", *asking, "--text", "a", "--text", "b")
    refuses("more than the model's context", *asking, "--text", "a", "--map_tokens", "100000")
    refuses("--text_file: /nowhere: No such file", *asking, "--text_file", "/nowhere")
    refuses("no text to look at; give --text", *asking)
    refuses("could not be written", *asking, "--text", "a", "--maps_folder", tmp_path / "text.txt")
    refuses("go with --attention_maps", "evaluate", "--workdir", workdir, "--text", "a")


@pytest.mark.slow
def test_an_encoder_decoder_is_given_its_target_or_writes_one(tmp_path, monkeypatch):
    workdir = converted("marian", tmp_path)
    found, _ = maps(workdir, tmp_path / "maps", "--text", "abc", "--text", "a cab")
    assert list(dict.fromkeys(one["stack"] for one in found["maps"])) == ["encoder", "decoder", "cross"]
    assert all((one["distance"] is None) == (one["stack"] == "cross") for one in found["maps"])
    assert (tmp_path / "maps" / f"cross_{found['maps'][-1]['layer']:02}.png").is_file()
    monkeypatch.setattr(SequenceToSequence, "write", lambda self, trained, rows, data, batch_size: ["a cab"])
    (tmp_path / "rows.tsv").write_text("source\nabc\nbed\n")
    written, _ = maps(workdir, tmp_path / "maps", "--source", f"tsv:{tmp_path}/rows.tsv")
    assert written == found | {"notice": "The model wrote the target itself."}


@pytest.mark.parametrize(
    ("case", "texts", "shown"),
    [
        ("bert_masked", ["a [MASK] b"], "a<mask>b"),
        ("bert_spans", ["a", "a cab fed"], "a</s>acabfed"),
        ("bert_classifier", ["bed"], "bed"),
    ],
)
def test_what_each_task_reads(case, texts, shown, tmp_path):
    restored = restore.restore(converted(case, tmp_path), meshes.make())
    kind = restored.kind()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "bed"}))
    data = Data(((f"jsonl:{tmp_path}/rows.jsonl", 1.0),), length=16)
    trained = restored.trained(kind, meshes.make())
    read = kind.inputs(trained, data, kind.completed(trained, data, texts))
    names = token_names(restored.tokenizer, read["tokens"])
    assert shown in "".join(names).replace("·", "")
    assert len(kind.inputs(trained, dataclasses.replace(data, length=10), texts)["tokens"]) <= 10
    if case == "bert_classifier":
        assert kind.first_example(data, "all") == texts
