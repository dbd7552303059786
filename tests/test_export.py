"""`python -m fastlm.export`: a folder that appears whole, with a card, or not at all."""

import errno
import json

import onnx
import pytest
from jax import export

from fastlm.exports import stablehlo
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import copied, with_tokenizer


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    outcome = call("convert", "--from", with_tokenizer(copied("llama", folder / "llama"), {}), "--to", folder / "run")
    assert outcome.status == 0, outcome.err
    return folder / "run"


def test_stablehlo(workdir, tmp_path):
    target = tmp_path / "out"
    outcome = call("export", "--workdir", workdir, "--format", "stablehlo", "--to", target)
    assert outcome.status == 0, outcome.err
    assert "wrote forward.stablehlo, prefill.stablehlo, decode.stablehlo" in outcome.out
    card = (target / "README.md").read_text()
    assert card.startswith("---\n") and "LlamaForCausalLM" in card and "--format stablehlo" in card
    assert "export.deserialize" in card and "license: unknown" in card
    assert f"- weights.safetensors: {(target / 'weights.safetensors').stat().st_size:,}\n" in card
    assert (target / "tokenizer" / "tokenizer.json").is_file()
    for name, told in json.loads((target / "signature.json").read_text())["programs"].items():
        assert export.deserialize(bytearray((target / told["file"]).read_bytes())).nr_devices == 1  # of 8 here
        assert "logits" in told["outputs"], name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stablehlo_writes_and_scores_like_the_workdir_it_came_from(workdir, tmp_path):
    target, text = tmp_path / "out", tmp_path / "text.jsonl"
    assert call("export", "--workdir", workdir, "--format", "stablehlo", "--to", target).status == 0
    assert "--runtime stablehlo" in (target / "README.md").read_text()
    elsewhere, ask = ["--runtime", "stablehlo", "--workdir", target], ["--max_tokens", "4", "--temperature", "1"]
    prompts = ["--prompt", "Hello", "--prompt", "What"]
    wanted, found = call("generate", "--workdir", workdir, *ask, *prompts), call("generate", *elsewhere, *ask, *prompts)
    assert found.status == 0, found.err
    assert found.out == wanted.out
    words = ["Hello", "world", "this", "is", "a", "text", "of", "words"]
    text.write_text("\n".join(json.dumps({"text": " ".join(words[:count])}) for count in (3, 8, 5, 7, 2, 6)))
    score = ["--source", f"jsonl:{text}#text", "--length", "32", "--batch_size", "2"]
    wanted, found = call("evaluate", "--workdir", workdir, *score), call("evaluate", *elsewhere, *score)
    assert found.status == 0, found.err
    metrics = lambda outcome: json.loads(outcome.out.splitlines()[-1])["metrics"]
    assert metrics(found) == pytest.approx(metrics(wanted), rel=1e-4)
    refuses("no onnx export", "evaluate", "--runtime", "onnx", "--workdir", target, *score)


@pytest.mark.slow
def test_onnx_writes_and_scores_like_the_workdir_it_came_from(workdir, tmp_path):
    target, text = tmp_path / "out", tmp_path / "text.jsonl"
    outcome = call("export", "--workdir", workdir, "--format", "onnx", "--to", target)
    assert outcome.status == 0, outcome.err
    assert (
        "wrote forward.onnx, prefill.onnx, decode.onnx, weights.data, signature.json, about.json, README.md"
        in outcome.out
    )
    card = (target / "README.md").read_text()
    assert "--runtime onnx" in card and "Format: onnx" in card
    ask = ["--prompt", "Hello", "--max_tokens", "4", "--temperature", "0"]
    elsewhere = ["--runtime", "onnx", "--workdir", target]
    for prompts in ([], ["--prompt", "What"]):
        wanted = call("generate", "--workdir", workdir, *ask, *prompts)
        found = call("generate", *elsewhere, *ask, *prompts)
        assert found.status == 0, found.err
        assert found.out == wanted.out
    drawn = ["--prompt", "Hello", "--prompt", "Hello", "--prompt", "What", "--max_tokens", "4", "--temperature", "1"]
    wanted, found = call("generate", "--workdir", workdir, *drawn), call("generate", *elsewhere, *drawn, "--rows", "1")
    assert found.status == 0 and found.out == wanted.out
    words = ["Hello", "world", "this", "is", "a", "text", "of", "words"]
    lines = [json.dumps({"text": " ".join(words[:count])}) for count in (3, 8, 5, 7, 2, 6)]
    text.write_text("\n".join(lines))  # of which several share a row
    score = ["--source", f"jsonl:{text}#text", "--length", "32", "--batch_size", "2"]
    wanted, found = call("evaluate", "--workdir", workdir, *score), call("evaluate", *elsewhere, *score)
    assert found.status == 0, found.err
    metrics = lambda outcome: json.loads(outcome.out.splitlines()[-1])["metrics"]
    assert metrics(found) == pytest.approx(metrics(wanted), rel=1e-4)
    search = [*ask, "--beams", "3", "--n_best", "2"]
    wanted, found = call("generate", "--workdir", workdir, *search), call("generate", *elsewhere, *search)
    assert found.status == 0 and found.out == wanted.out and len(found.out.splitlines()) == 2
    refuses("--draft: goes with --runtime jax", "generate", *elsewhere, *ask, "--draft", "lookup")
    refuses("--weights: was chosen when the model was exported", "generate", *elsewhere, *ask, "--weights", "int8")
    refuses("--dtype: was chosen when the model was exported", "evaluate", *elsewhere, "--dtype", "bfloat16")
    refuses("--tensor: goes with --runtime jax", "generate", *elsewhere, *ask, "--tensor", "2")
    graph = onnx.load(target / "forward.onnx", load_external_data=False)
    graph.opset_import[0].version = 99  # as one of a runtime to come would be
    (target / "forward.onnx").write_bytes(graph.SerializeToString())
    refuses("graphs need opset 23: upgrade onnxruntime if it is older", "evaluate", *elsewhere, *score)
    (target / "prefill.onnx").write_bytes(bytes((target / "prefill.onnx").stat().st_size))
    late = call("generate", *elsewhere, *ask)
    assert late.status == 2 and late.out == "" and "cannot read 'prefill'" in late.err
    (target / "about.json").write_text("{}")
    refuses("about.json or tokenizer.fastlm.json cannot be read", "evaluate", *elsewhere, *score)


def test_rows_longer_than_an_export_of_fixed_length(workdir, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    ask = ["export", "--workdir", workdir, "--format", "onnx", "--to", out]
    assert call(*ask, "--length", "16").status == 0
    text.write_text("a cab " * 40)
    score = ["evaluate", "--runtime", "onnx", "--workdir", out, "--source", f"text:{text}", "--batch_size", "2"]
    assert call(*score, "--length", "16").status == 0
    refuses("rows of 24 tokens; the model was exported for 16 (--length)", *score, "--length", "24")


def test_ranges_of_inputs_are_found_on_data(workdir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Hello world, this is a text of some words.\n" * 40)
    target, source = tmp_path / "out", ["--source", f"text:{text}"]
    ask = ["export", "--workdir", workdir, "--format", "onnx", "--weights", "int8_static", "--to", target]
    refuses("ranges of inputs need data, and this model came without; give --source", *ask)
    outcome = call(*ask, *source, "--split", "all", "--calibration_batches", "1", "--calibration_length", "16")
    assert outcome.status == 0, outcome.err
    score = [*source, "--length", "32", "--batch_size", "2"]
    scored = [
        json.loads(call("evaluate", *arguments, *score).out.splitlines()[-1])["metrics"]["loss"]
        for arguments in (["--workdir", workdir], ["--runtime", "onnx", "--workdir", target])
    ]
    assert scored[1] == pytest.approx(scored[0], rel=0.02) and scored[1] != scored[0]


@pytest.mark.parametrize(("case", "row"), [("bert_model", {"text": "a cab"}), ("bart", {"source": "a", "target": "b"})])
def test_ranges_are_found_of_models_that_have_no_score_or_one_by_writing(case, row, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 8)
    folder = with_tokenizer(copied(case, tmp_path / case), {})
    assert call("convert", "--from", folder, "--to", tmp_path / "run").status == 0
    ask = ["--workdir", tmp_path / "run", "--format", "onnx", "--weights", "int8_static", "--source", f"jsonl:{rows}"]
    outcome = call("export", *ask, "--split", "all", "--to", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "forward.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_flags_that_only_ranges_need(workdir, tmp_path):
    ask = ["export", "--workdir", workdir, "--format", "onnx", "--to", tmp_path / "new"]
    refuses("--source: goes with --weights int8_static", *ask, "--source", "state_of_the_union")
    refuses("--split: goes with --weights int8_static", *ask, "--weights", "int8", "--split", "test")
    refuses("--calibration_length: goes with --weights int8_static", *ask, "--calibration_length", "8")


def test_mistakes_leave_nothing_behind(workdir, tmp_path):
    ask = ["export", "--workdir", workdir, "--format", "stablehlo", "--to"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refuses("full exists and is not an empty folder; name another one", *ask, tmp_path / "full")
    refuses("--length: 9999 is more than the model's context of", *ask, tmp_path / "new", "--length", "9999")
    refuses("--weights: --format stablehlo keeps float32, not 'int4'", *ask, tmp_path / "new", "--weights", "int4")
    onnx = ["export", "--workdir", workdir, "--format", "onnx", "--to", tmp_path / "new"]
    refuses("--dtype: bfloat16 goes with --format stablehlo", *onnx, "--dtype", "bfloat16")
    refuses("no onnx export", "generate", "--runtime", "onnx", "--workdir", workdir, "--prompt", "Hello")
    refuses("no checkpoint", "export", "--workdir", tmp_path, "--format", "stablehlo", "--to", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_disk_that_is_full_leaves_nothing_behind(workdir, tmp_path, monkeypatch):
    def fill(folder, *_):
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stablehlo, "write", fill)
    ask = ["export", "--workdir", workdir, "--format", "stablehlo", "--to", tmp_path / "new"]
    refuses("new: could not be written (No space left on device); check space and permissions", *ask)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    refuses("could not be written (", *ask[:-1], tmp_path / "file" / "new")


@pytest.mark.slow
def test_what_onnx_writes_of_sources_is_scored_as_the_workdir_s_own(tmp_path):
    """By a search, as translators are; the search moves the runtime's caches between beams."""
    folder = with_tokenizer(copied("bart", tmp_path / "bart"), {})
    assert call("convert", "--from", folder, "--to", tmp_path / "run").status == 0
    assert call("export", "--workdir", tmp_path / "run", "--format", "onnx", "--to", tmp_path / "out").status == 0
    words = ["Hello", "world", "this", "is", "a", "text", "of", "words"]
    lines = [{"source": " ".join(words[:count]), "target": " ".join(words[-count:])} for count in (2, 5, 3)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    score = ["--source", f"jsonl:{text}", "--length", "12", "--batch_size", "2", "--outputs", "3"]
    wanted = call("evaluate", "--workdir", tmp_path / "run", *score)
    found = call("evaluate", "--runtime", "onnx", "--workdir", tmp_path / "out", *score)
    assert found.status == wanted.status == 0, found.err + wanted.err
    (*texts, told), (*wanted_texts, wanted_told) = found.out.splitlines(), wanted.out.splitlines()
    assert texts == wanted_texts and len(texts) > 3
    assert json.loads(told)["metrics"] == json.loads(wanted_told)["metrics"]
