"""`python -m fastlm.convert`: into a workdir that the other entry points restore, and back."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from experiments.benchmarks.huggingface_parity import same_tensors
from fastlm.models import huggingface
from fastlm.parallel import mesh as meshes
from fastlm.training import build, loop, restore
from tests.data import marian_files
from tests.entry_points import call, refuses
from tests.models.huggingface_folders import GOLDEN, WORDS, copied, options_of, with_tokenizer


@pytest.fixture(autouse=True)
def leave_no_mesh(no_mesh):
    pass


@pytest.fixture
def folder(tmp_path):
    return with_tokenizer(copied("llama", tmp_path / "model"), {"chat_template": "{{ messages }}"})


def convert(*arguments):
    outcome = call("convert", *arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out


def test_into_a_workdir_and_back(folder, tmp_path):
    workdir, back = tmp_path / "run", tmp_path / "back"
    said = convert("--from", folder, "--to", workdir)
    assert "read LlamaForCausalLM" in said and "18,688 parameters" in said and "wrote step 0" in said
    said = convert("--from", workdir, "--to", back)
    assert f"wrote LlamaForCausalLM to {back}" in said
    assert same_tensors(folder, back)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert huggingface.read(back).cfg == huggingface.read(folder).cfg


def test_a_card_lies_beside_what_is_written(folder, tmp_path):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: mit\n")
    convert("--from", folder, "--to", tmp_path / "run")
    convert("--from", tmp_path / "run", "--to", tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "library_name: transformers\nlicense: apache-2.0\n" in card and "License: apache-2.0" in card
    assert "LlamaForCausalLM.from_pretrained" in card and f"python -m fastlm.convert --from {tmp_path}/run" in card
    assert f"- model.safetensors: {(tmp_path / 'back' / 'model.safetensors').stat().st_size:,}\n" in card
    assert huggingface.read(tmp_path / "back").license == "apache-2.0"
    gguf = ["--workdir", tmp_path / "run", "--format", "gguf", "--to", tmp_path / "gguf"]
    refuses("gguf: rotary scaling (8.0, 1.0, 4.0, 64.0) is not that of Llama 3", "export", *gguf)
    assert not (tmp_path / "gguf").exists()


def test_a_folder_for_transformers_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    convert("--from", folder, "--to", tmp_path / "run")

    def fill(path, *_, **__):
        (path / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write", fill)
    refuses("No space left on device", "convert", "--from", tmp_path / "run", "--to", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'cc-by-4.0'\n---", "cc-by-4.0"),
        ("---\nlicense: unknown\n---\n", ""),
        ("---\nlicense: <b>\n---\n", ""),
        ("---\ntags: [a]\n---\nlicense: mit\n", ""),
        ("# no header\nlicense: mit\n", ""),
        (None, ""),
    ],
)
def test_licenses_that_cards_name(text, name, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert huggingface.folders.license_of(tmp_path) == name


def test_what_a_run_knows_of_its_task_goes_along(tmp_path):
    """A regressor learns standardized targets: elsewhere the head has mean and scale, in a workdir the task."""
    folder, run = with_tokenizer(copied("bert_model", tmp_path / "model"), {}), tmp_path / "run"
    convert("--from", folder, "--to", run, "--head", "sequence", "--classes", "1")
    file = run / "checkpoints" / "0" / "about" / "metadata"
    about = json.loads(file.read_text())
    year = {"text": "speech", "target": "year", "mean": 1910.0, "scale": 50.0}
    about["config"]["task"] = {"name": "regression"} | year
    about["config"]["data"]["length"] = 12
    file.write_text(json.dumps(about))

    def estimate(workdir, field):
        outcome = call("predict", "--workdir", workdir, "--row", json.dumps({field: "a cab"}))
        return json.loads(outcome.out)["said"]

    expected = estimate(run, "speech")
    assert abs(expected - 1910) > 0.1
    convert("--from", run, "--to", tmp_path / "out")
    convert("--from", tmp_path / "out", "--to", tmp_path / "again")
    np.testing.assert_allclose(estimate(tmp_path / "again", "text"), expected, rtol=1e-6)
    convert("--from", run, "--to", tmp_path / "copy", "--format", "fastlm")
    original, copy = (restore.restore(path, meshes.make()) for path in (run, tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, original.params, copy.params)
    for section in ("task", "data", "compute"):
        assert copy.about["config"][section] == about["config"][section]


def test_how_a_sentence_encoder_ends_goes_through_a_workdir(tmp_path):
    folder = with_tokenizer(copied("bert_model", tmp_path / "model"), {})
    imported = huggingface.read(folder)
    huggingface.write(folder, imported.cfg, imported.params, modules=("Pooling", "Normalize"))
    convert("--from", folder, "--to", tmp_path / "run")
    convert("--from", tmp_path / "run", "--to", tmp_path / "back")
    assert (tmp_path / "back" / "modules.json").read_bytes() == (folder / "modules.json").read_bytes()
    assert huggingface.read(tmp_path / "back").cfg.pooling == "first"


def test_a_workdir_is_what_the_other_entry_points_restore(folder, tmp_path):
    workdir = tmp_path / "run"
    convert("--from", folder, "--to", workdir, "--dtype", "bfloat16")
    restored, original = restore.restore(workdir, meshes.make()), huggingface.read(folder)
    assert restored.model.cfg == original.cfg and restored.step == 0
    kernel = np.asarray(restored.params["head"]["kernel"])
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, original.params["head"]["kernel"], rtol=2**-8)
    assert restored.tokenizer.decode(restored.tokenizer.encode("abc a")) == "abc a"
    assert (restored.tokenizer.bos, restored.tokenizer.eos) == (1, 2)
    assert restored.about["huggingface"]["chat_template"] == "{{ messages }}"
    outcome = call("generate", "--workdir", workdir, "--prompt", "abc", "--max_tokens", "3", "--temperature", "0")
    assert outcome.status == 0 and outcome.out.startswith("abc")
    text = tmp_path / "text.txt"
    text.write_text("a cab feeds a bad dad\n" * 20)
    arguments = ["--source", f"text:{text}", "--length", "32", "--batch_size", "1", "--batches", "1"]
    outcome = call("evaluate", "--workdir", workdir, *arguments)
    assert outcome.status == 0 and "bits_per_byte" in outcome.out, outcome.err


def test_what_is_fine_tuned_keeps_the_tokenizer_files_that_the_model_came_with(
    folder, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"unk_token": "<unk>", "cls_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    convert("--from", folder, "--to", tmp_path / "base")
    tiny_config |= {"init": {"source": str(tmp_path / "base"), "step": ""}, "model": {}}
    tiny_config["training"]["steps"] = 1
    tiny_config["evaluation"] |= {"split": "", "final_split": ""}
    stale = tmp_path / "tuned" / "tokenizer" / "merges.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of another run")
    loop.run(build.build(tiny_config, tmp_path / "tuned"), say=lambda text: None)
    convert("--from", tmp_path / "tuned", "--to", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "back" / "merges.txt").exists()
    assert not list((tmp_path / "tuned" / "tokenizer").glob("*.partial"))

    tiny_config["tokenizer"] = {"kind": "huggingface", "path": str(folder), "vocab_size": 0}
    assert build.build(tiny_config, tmp_path / "other").origin == {}, "nothing is carried for another tokenizer"


def test_a_start_token_that_the_tokenizer_does_not_use_is_none(folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert("--from", folder, "--to", tmp_path / "run")
    assert restore.restore(tmp_path / "run", meshes.make()).tokenizer.bos is None


def test_a_folder_of_marian_as_it_is_published(tmp_path):
    folder, workdir, back = copied("marian", tmp_path / "model"), tmp_path / "run", tmp_path / "back"
    marian_files.write(folder)
    convert("--from", folder, "--to", workdir)
    tokenizer = restore.restore(workdir, meshes.make()).tokenizer
    assert tokenizer.encode("the cat").tolist() != tokenizer.encode_target("the cat").tolist()
    outcome = call("generate", "--workdir", workdir, "--prompt", "the cat", "--max_tokens", "3", "--temperature", "0")
    assert outcome.status == 0, outcome.err
    convert("--from", workdir, "--to", back)
    shutil.rmtree(workdir / "tokenizer")  # as if it had been trained here with these files
    convert("--from", workdir, "--to", tmp_path / "anew")
    for name in ("source.spm", "target.spm"):
        assert (back / name).read_bytes() == (tmp_path / "anew" / name).read_bytes() == (folder / name).read_bytes()
    vocabularies = [json.loads((path / "vocab.json").read_text()) for path in (folder, back, tmp_path / "anew")]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2] and same_tensors(folder, back)
    (folder / "target.spm").unlink()
    half = ["convert", "--from", folder, "--to", tmp_path / "half"]
    refuses("not all of source.spm, target.spm, vocab.json; only vocab.json, source.spm", *half)


def test_from_one_folder_to_another_with_a_new_head(tmp_path):
    out = tmp_path / "out"
    arguments = ["--format", "huggingface", "--head", "sequence", "--classes", "4", "--dtype", "bfloat16"]
    said = convert("--from", GOLDEN / "distilbert_masked", "--to", out, *arguments)
    assert "made anew: " in said and "left out: " in said
    assert options_of(out)["architectures"] == ["DistilBertForSequenceClassification"]
    imported = huggingface.read(out, dtype="stored")
    assert imported.cfg.classes == 4 and imported.params["head"]["kernel"].dtype.name == "bfloat16"


def test_a_model_without_a_tokenizer_needs_one(folder, tmp_path):
    arguments = ["--from", GOLDEN / "gpt2", "--to", tmp_path / "run"]
    refuses("holds no tokenizer; give a folder with one as --tokenizer", "convert", *arguments)
    refuses("holds none of tokenizer.json", "convert", *arguments, "--tokenizer", GOLDEN)
    convert(*arguments, "--tokenizer", folder)
    assert restore.restore(tmp_path / "run", meshes.make()).tokenizer.vocab_size == len(WORDS)


def test_flags_that_a_direction_does_not_read_are_refused(folder, tmp_path):
    convert("--from", folder, "--to", tmp_path / "run")
    new = ["--to", tmp_path / "new"]
    idle = {"head": "none", "classes": 3, "max_length": 8, "pooling": "mean", "tokenizer": folder, "revision": "v1"}
    for name, value in idle.items():
        arguments = ["--from", tmp_path / "run", *new, f"--{name}", value]
        refuses(f"--{name}: only has an effect if --from is no workdir", "convert", *arguments)
    refuses("--step: only has an effect if --from is a workdir", "convert", "--from", folder, *new, "--step", "0")
    named = ["--architecture", "LlamaForCausalLM"]
    for source, others in ((folder, []), (tmp_path / "run", ["--format", "fastlm"])):
        arguments = ["--from", source, *new, *others, *named]
        refuses("--architecture: only has an effect if a Hugging Face folder is written", "convert", *arguments)
    assert not (tmp_path / "new").exists()
    convert("--from", tmp_path / "run", *new, "--step", "0", *named)


def test_mistakes(folder, tmp_path):
    new, larger = tmp_path / "new", tmp_path / "larger"
    refuses("exists and is not an empty folder", "convert", "--from", folder, "--to", folder)
    refuses("no such file or folder", "convert", "--from", tmp_path / "nothing", "--to", new)
    for_one = ["convert", "--from", folder, "--to", new]
    refuses("fit GPT2LMHeadModel", *for_one, "--format", "huggingface", "--architecture", "GPT2LMHeadModel")
    shutil.copytree(folder, larger)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": len(WORDS) + i for i in range(60)}
    (larger / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuses("has 126 tokens and the model 67", *for_one, "--tokenizer", larger)
    (larger / "tokenizer.json").unlink()
    refuses("no tokenizer.json", *for_one, "--tokenizer", larger)
    assert not new.exists()  # nothing is left that would be in the way of the right command
