"""`python -m fastlm.export`: a folder that appears whole, with a card, or not at all."""

import json

import pytest
from jax import export

from tests.models.huggingface_folders import copied, with_tokenizer
from tests.test_bad_input import call, refuses


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
    assert (target / "tokenizer" / "tokenizer.json").is_file()
    for name, told in json.loads((target / "signature.json").read_text())["programs"].items():
        assert export.deserialize(bytearray((target / told["file"]).read_bytes())).fun_name
        assert told["outputs"][0] == "logits", name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mistakes_leave_nothing_behind(workdir, tmp_path):
    ask = ["export", "--workdir", workdir, "--format", "stablehlo", "--to"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refuses("full exists and is not an empty folder; name another one", *ask, tmp_path / "full")
    refuses("--length: 9999 is more than the model's context of", *ask, tmp_path / "new", "--length", "9999")
    refuses("no checkpoint", "export", "--workdir", tmp_path, "--format", "stablehlo", "--to", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
