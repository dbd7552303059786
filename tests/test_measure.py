"""`python -m fastlm.measure` on small models, its workers being processes of their own."""

import json

import jax
import pytest

from fastlm.models import ModelConfig, abstract
from fastlm.training import build, loop
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import copied, with_tokenizer


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "text.txt").write_text("abc cab " * 40)
    for case in ("llama", "gpt2"):
        source = with_tokenizer(copied(case, folder / "from" / case), {})
        outcome = call("convert", "--from", source, "--to", folder / case)
        assert outcome.status == 0, outcome.err
    return folder


def test_a_model_beside_its_baseline(workdirs):
    small = ["--prompt", "16", "--new", "8", "--turns", "2", "--batches", "1,2"]
    outcome = call(
        "measure",
        *("--workdir", workdirs / "llama", "--baseline", workdirs / "gpt2", "--source", f"text:{workdirs}/text.txt"),
        *small,
    )
    assert outcome.status == 0, outcome.err
    table, words = outcome.out.split("\n\n")[:2]
    assert table.splitlines()[0] == "|  | gpt2 | llama | llama / gpt2 |" and "| bits_per_byte |" in table
    assert "bytes" in words and "at writing, 2 rows" in words
    folder = workdirs / "llama" / "measured"
    assert (folder / "measured.md").read_text().startswith(table)
    assert (folder / "measured.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "measured.json").read_text())
    assert [(load["rows"], load["length"], load["count"]) for load in facts["loads"]] == [
        *((1, 16, 0), (2, 16, 0), (1, 16, 8), (2, 16, 8))
    ]
    for model in facts["models"]:
        about = json.loads((workdirs / model["name"] / "checkpoints/0/about/metadata").read_text())
        shapes = abstract(ModelConfig.from_json(json.dumps(about["model"])))[0]
        assert model["sizes"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert model["sizes"]["stored"] == 4 * model["sizes"]["parameters"] and model["sizes"]["files"] > 0
        assert all(len(turns) == 2 for turns in model["seconds"].values())
        assert model["quality"]["bits_per_byte"] > 0 and model["memory"] > 50


@pytest.mark.slow
def test_an_export_beside_the_workdir_it_came_from(workdirs):
    target = workdirs / "exported"
    alone = ["measure", "--workdir", target, "--runtime", "onnx"]
    outcome = call(
        "export", "--workdir", workdirs / "llama", "--format", "onnx", "--weights", "int8_blocks", "--to", target
    )
    assert outcome.status == 0, outcome.err
    outcome = call(
        *("measure", "--workdir", target, "--runtime", "onnx", "--baseline", workdirs / "llama"),
        *("--prompt", "16", "--new", "8", "--turns", "2", "--batches", "2", "--source", f"text:{workdirs}/text.txt"),
    )
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[0] == "|  | llama | exported | exported / llama |"
    card, table = (target / "README.md").read_text(), (target / "measured" / "measured.md").read_text()
    assert "## How to run it" in card and card.endswith(f"\n## Measured\n\n{table}")
    refuses("--step: only has an effect with a model that jax runs", *alone, "--step", "3")
    refuses("--cache_dtype: only has an effect with a model that jax runs", *alone, "--cache_dtype", "int8")
    refuses("--baseline_runtime: only has an effect with --baseline", *alone, "--baseline_runtime", "onnx")
    before, after = json.loads((target / "measured" / "measured.json").read_text())["models"]
    assert before["sizes"]["parameters"] == after["sizes"]["parameters"]
    assert after["sizes"]["stored"] == (target / "weights.data").stat().st_size
    assert after["quality"]["bits_per_byte"] == pytest.approx(before["quality"]["bits_per_byte"], rel=0.1)
    assert all(piece > 0 for turn in after["seconds"]["writing, 2 rows"] for piece in turn)


@pytest.mark.slow
def test_weights_in_eight_bits_beside_themselves(tiny_config, tmp_path):
    """And what is written with them is nearly the same text: the model has few ways to go on."""
    tiny_config["model"] |= {"width": 128, "heads": 2}  # matrices of a size that is rounded
    tiny_config["mesh"] |= {"data": -1}
    run = tmp_path / "run"
    loop.run(build.build(tiny_config, run), say=lambda text: None)
    outcome = call(
        *("measure", "--workdir", run, "--weights", "int8", "--baseline", run, "--prompt", "16", "--new", "8"),
        *("--turns", "2", "--batches", "1"),
    )
    assert outcome.status == 0, outcome.err
    before, after = json.loads((run / "measured" / "measured.json").read_text())["models"]
    assert after["name"].endswith("@12 int8") and before["sizes"]["parameters"] == after["sizes"]["parameters"]
    assert after["sizes"]["stored"] < 0.3 * before["sizes"]["stored"]
    assert after["quality"]["bits_per_byte"] == pytest.approx(before["quality"]["bits_per_byte"], rel=0.01)
    assert after["quality"] != before["quality"]
    ask = ["generate", "--workdir", run, "--prompt", "abc", "--max_tokens", "4", "--temperature", "0"]
    whole, small = call(*ask), call(*ask, "--weights", "int8")
    assert small.status == 0, small.err
    assert small.out == whole.out and small.out.startswith("abc")
    refuses("--weights int8: goes with weights on one device", *ask, "--weights", "int8", "--tensor", "2")


def test_mistakes_are_one_line_before_anything_starts(workdirs, tmp_path):
    measure = ["measure", "--workdir", workdirs / "llama"]
    refuses("--batches: needs numbers of rows like 1,8, got '1,no'", *measure, "--batches", "1,no")
    refuses("is the same checkpoint; name another, or leave it out", *measure, "--baseline", workdirs / "llama")
    refuses("no checkpoint", *measure, "--baseline", tmp_path)


@pytest.mark.slow
def test_an_export_for_rows_of_one_length_is_measured_in_such_rows(workdirs):
    """Its baseline too, which could read longer ones."""
    target, small = workdirs / "fixed", ["--new", "8", "--turns", "2", "--batches", "1"]
    made = call("export", "--workdir", workdirs / "llama", "--format", "stablehlo", "--length", "16", "--to", target)
    assert made.status == 0, made.err
    ask = ["measure", "--workdir", target, "--runtime", "stablehlo", "--baseline", workdirs / "llama", *small]
    outcome = call(*ask, "--source", f"text:{workdirs}/text.txt")
    assert outcome.status == 0, outcome.err
    facts = json.loads((target / "measured" / "measured.json").read_text())
    assert {load["length"] for load in facts["loads"]} == {16}
    before, after = facts["models"]
    assert after["quality"]["bits_per_byte"] == pytest.approx(before["quality"]["bits_per_byte"], rel=1e-5)
    assert after["sizes"]["stored"] == (target / "weights.safetensors").stat().st_size
    late = call(*ask, "--prompt", "17")  # which is known when both have been opened
    assert late.status == 2 and "--prompt: 17 tokens, but a model was exported for rows of 16; give fewer" in late.err
