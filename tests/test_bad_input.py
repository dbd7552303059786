"""Mistakes, typed as a user would: one line on stderr that names them, status 2, and nothing on disk has changed.

The entry points run in this process (see entry_points.py); a few run as real processes in test_processes.py.
"""

import contextlib
import hashlib
import json
import shutil
import time
from pathlib import Path

import jax
import pytest

from tests.entry_points import call, refuses

ROOT = Path(__file__).parent.parent

CONFIG = """
from configs import base

def get_config():
    config = base.get_config()
    config.tokenizer.kind = "bytes"
    config.model.update(layers=1, width=16, heads=2, max_length=64)
    config.compute.dtype = "float32"
    config.data.update(sources=(("SOURCE", 1.0),), length=32, batch_size=8)
    config.training.steps = 4
    config.schedule.update(name="constant", warmup=0)
    config.evaluation.update(every=2, batches=1, final_split="")
    config.checkpoint.update(every=2, keep=3)
    config.logging.update(every=1, tensorboard=False)
    return config
"""


def contents(folder):
    """What is on disk: path -> digest, so that any change shows."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, no_mesh):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(CONFIG.replace("SOURCE", corpus))
    return file


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    """A finished run of four steps, with checkpoints at 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    mesh = jax.sharding.get_mesh()
    with contextlib.chdir(ROOT):
        outcome = call("train", "--config", config_file, "--workdir", workdir)
    jax.set_mesh(mesh)
    assert outcome.status == 0, outcome.err
    return workdir


@pytest.fixture
def run_copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


OVERRIDES = [
    ("model.layer=2", "--config.model.layer: config.model has no 'layer'; did you mean 'layers'?"),
    ("modle.layers=2", "config has no 'modle'; did you mean 'model'?"),
    ("model.layers.x=3", "config.model.layers is a value, not a section"),
    ("model=3", "--config.model: is a section"),
    ("model.layers", "no value given"),
    ("model.layers=two", "config.model.layers: expected int, got 'two' (str)"),
    ("model.layers=1.5", "config.model.layers: expected int"),
    ("model.layers=0", "config.model.layers: must be at least 1"),
    ("model.heads=3", "width 16 is not divided by 3 heads"),
    ("model.heads=(2,2)", "config.model.heads: 2 values for 1 layers"),
    ("model.kv_heads=3", "3 kv_heads do not divide 2 heads"),
    ("model.attention=fulll", "did you mean 'full'?"),
    ("model.attention=local(windw=8)", "config.model.attention: local.windw: no such key; did you mean 'window'?"),
    ("model.attention=local(window=0)", "window must be at least 1"),
    ("model.attention=linformer", "kind 'linformer' cannot hide later tokens"),
    ("model.softmax=top", "config.model.softmax: unknown kind 'top'"),
    ("model.feed_forward=gleu", "config.model.feed_forward: unknown 'gleu'; did you mean 'gelu'?"),
    ("model.max_length=16", "config.data.length: 32 is more than config.model.max_length 16"),
    ("model.vocab_size=10", "config.model.vocab_size: 10 is less than the tokenizer's 257"),
    ("model.dropout=nan", "config.model.dropout"),
    ("compute.dtype=float64", "config.compute.dtype: unknown 'float64'; did you mean 'float16'?"),
    ("seed=-1", "config.seed"),
    ("seed=1.5", "config.seed: expected int"),
    ("data.batch_size=0", "config.data.batch_size: must be at least 1, got 0"),
    ("data.batch_size=-8", "config.data.batch_size: must be at least 1, got -8"),
    ("data.batch_size=12", "config.data.batch_size: 12 rows"),
    ("data.length=-1", "config.data.length: must be at least 1"),
    ("data.mode=packd", "config.data: unknown mode 'packd'; did you mean 'packed'?"),
    ("data.shards=3", "batch_size 8 is no multiple of shards 3"),
    ("data.split=trian", "has no split 'trian'; did you mean 'train'?"),
    ("data.split=train[", "split 'train[' is not understood"),
    ("data.sources=()", "no data source is named"),
    ("data.sources=lm1b", "config.data.sources: expected tuple"),
    ("data.sources=(('text:/nowhere/*.txt',1),)", "no file matches text:/nowhere/*.txt"),
    ("data.sources=(('lm1b',1),)", "python -m fastlm.data.prepare lm1b"),
    ("data.sources=(('state_of_the_unoin',1),)", "did you mean 'state_of_the_union'?"),
    ("tokenizer.kind=byte", "unknown tokenizer kind 'byte'; did you mean 'bytes'?"),
    ("tokenizer.kind=huggingface", "needs a path"),
    ("tokenizer.kind=bpe", "config.tokenizer: too little text for a BPE of 4096 tokens"),
    ("training.steps=0", "config.training.steps: must be at least 1"),
    ("training.steps=-5", "config.training.steps: must be at least 1"),
    ("training.steps=abc", "config.training.steps: expected int, got 'abc'"),
    ("training.accumulation=0", "config.training.accumulation: must be at least 1"),
    ("training.accumulation=3", "3 does not divide the batch of 8 rows"),
    ("training.average_decay=1", "config.training.average_decay: must be in [0, 1)"),
    ("training.max_skipped=0", "config.training.max_skipped: must be at least 1"),
    ("schedule.peak=0", "schedule: needs peak > 0"),
    ("schedule.peak=nan", "config.schedule.peak: expected float, got 'nan'"),
    ("schedule.peak=1e999", "schedule: needs peak > 0"),
    ("schedule.name=cosin", "did you mean 'cosine'?"),
    ("optimizer.name=adam", "did you mean 'adamw'?"),
    ("optimizer.b1=1", "optimizer.b1"),
    ("evaluation.every=-1", "config.evaluation.every: must be at least 0"),
    ("evaluation.batches=-1", "config.evaluation.batches: must be at least 0"),
    ("evaluation.split=validatoin", "did you mean 'validation'?"),
    ("evaluation.overlap=32", "overlap 32 must be at least 0 and less than the length 32"),
    ("checkpoint.every=0", "config.checkpoint.every: must be at least 1"),
    ("checkpoint.keep=0", "config.checkpoint.keep: must be at least 1"),
    ("logging.every=0", "config.logging.every: must be at least 1"),
    ("sample.tokens=0", "config.sample.tokens: must be at least 1"),
    ("sample.temperature=-1", "config.sample: temperature must be a number >= 0"),
    ("sample.prompts=('" + "x" * 64 + "',)", "config.sample.prompts: the longest prompt has 65 tokens"),
    ("mesh.data=3", "config.mesh: data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices but there are 8"),
    ("mesh.tensor=3", "3 does not divide the 8 devices"),
    ("mesh.tensor=-1", "at most one may be -1"),
    ("mesh.pipeline=2", "config.mesh has no 'pipeline'"),
    ("task.name=language_modelling", "did you mean 'language_modeling'?"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override[:40] for override, _ in OVERRIDES])
def test_overrides_that_cannot_work(config_file, tmp_path, override, message):
    refuses(message, "train", "--config", config_file, "--workdir", tmp_path / "run", f"--config.{override}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.attention=linear", "sample.prompts=('a',)"), "sample.prompts: config.compute.cache_dtype: linear"),
        (("task.name=sequence_to_sequence",), "config.task.beams: the final score is a search with 4; cache_dtype"),
    ],
)
def test_caches_in_eight_bits_that_the_end_of_a_run_could_not_use(config_file, tmp_path, overrides, message):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"source": "abc", "target": "cba", "split": "train"}\n' * 8)
    of_pairs = (f"data.sources=(('jsonl:{pairs}', 1.0),)",) if "task" in overrides[0] else ()
    changes = [f"--config.{change}" for change in ("compute.cache_dtype=int8", *of_pairs, *overrides)]
    refuses(message, "train", "--config", config_file, "--workdir", tmp_path / "run", *changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config: no file"),
        ("def get_config(:\n", "line 1: invalid syntax"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\ndef get_config():\n    return {}['layers']\n", "line 3: KeyError: 'layers'"),
        ("def get_config():\n    return {}\n", "returns dict, not a ConfigDict"),
        ("x = 1\n", "defines no get_config()"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ],
)
def test_config_files_that_cannot_work(tmp_path, text, message):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    refuses(message, "train", "--config", file, "--workdir", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config"),
        (["--config"], "Missing value for flag --config"),
        (["--config", "configs/lm_tinny.py"], "did you mean 'configs/lm_tiny.py'?"),
        (["--config", "README.md"], "README.md is no Python file"),
        (["--config", "configs"], "--config: no file configs"),
        (
            [*("--config", "configs/distill/language_model.py"), "--config.training.accumulation=1"],
            "config.tokenizer.path: runs/lm_reference holds no fastlm checkpoint",
        ),
        (
            [
                *("--config", "configs/distill/language_model.py", "--config.training.accumulation=1"),
                "--config.tokenizer.kind=bytes",
            ],
            "config.distilled.teachers: runs/lm_reference holds no fastlm checkpoint",
        ),
        (["--confg", "configs/lm_tiny.py"], "Did you mean: config"),
        (["--config", "configs/lm_tiny.py", "model.layers=2"], "unexpected argument 'model.layers=2'"),
        (["--config", "configs/lm_tiny.py", "--profile=maybe"], "--profile"),
        (["--config", "configs/lm_tiny.py:small"], "TypeError: get_config()"),
    ],
)
def test_command_lines_that_cannot_work(arguments, message):
    refuses(message, "train", *arguments)


def test_overrides_of_a_command_that_reads_no_config():
    refuses(
        "--config.data.split: this command reads no config", "evaluate", "--workdir", "x", "--config.data.split=test"
    )


def test_a_public_data_set_that_is_not_here_is_an_error_at_once(config_file, tmp_path):
    start = time.monotonic()
    override = "--config.data.sources=(('c4/en', 1.0),)"
    refuses("no data set 'c4/en'", "train", "--config", config_file, "--workdir", tmp_path / "run", override)
    assert time.monotonic() - start < 60, "it asked the network"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "all empty"),
        (b"good text\n" * 50 + b"\xff\xfe bad", "is not valid UTF-8 at byte 500 (0xff)"),
        (b"{not json}\n" * 40, "line"),
    ],
)
def test_corpora_that_cannot_be_read(config_file, tmp_path, data, message):
    kind = "jsonl" if data.startswith(b"{") else "text"
    for i in range(1 if kind == "jsonl" else 30):
        (tmp_path / f"{i}.txt").write_bytes(data)
    source = f"{kind}:{tmp_path}/*.txt"
    override = f"--config.data.sources=(({source!r}, 1.0),)"
    refuses(message, "train", "--config", config_file, "--workdir", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "abc"], "no checkpoint at step abc; choose from [2, 4], or 'best'"),
        (["--step", "3"], "no checkpoint at step 3; choose from [2, 4], or 'best'"),
        (["--step", "-4"], "no checkpoint at step -4"),
        (["--average"], "the run kept no averaged weights"),
        (["--dtype", "int8"], "--dtype"),
        (["--workdir", "/nowhere"], "/nowhere: no checkpoints folder there"),
        (["--workdir", __file__], "no checkpoints folder there"),
    ],
)
def test_checkpoints_that_are_not_there(trained, entry, arguments, message):
    prompt = ["--prompt", "a"] if entry == "generate" else []
    before = contents(trained)
    refuses(message, entry, "--workdir", trained, *prompt, *arguments)
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "nope"], "has no split 'nope'"),
        (["--source", "text:/nowhere/*"], "no file matches text:/nowhere/*"),
        (["--source", "lm1b"], "no data set 'lm1b'"),
        (["--length", "-1"], "--length"),
        (["--length", "65"], "--length: 65 is more than the model's context of 64"),
        (["--overlap", "32"], "overlap 32"),
        (["--batch_size", "0"], "--batch_size"),
        (["--batches", "-1"], "--batches"),
    ],
)
def test_evaluations_that_cannot_work(trained, arguments, message):
    refuses(message, "evaluate", "--workdir", trained, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to continue; give --prompt TEXT or --prompts FILE"),
        (["--prompt", "a" * 64], "the longest prompt has 65 tokens, and 1 more make 66"),
        (["--prompt", "a", "--max_tokens", "63"], "the model's context is 64 tokens"),
        (["--prompt", "a", "--max_tokens", "-1"], "--max_tokens"),
        (["--prompt", "a\udcff"], "the prompt is not valid UTF-8 at character 1"),
        (["--prompts", "/nowhere"], "--prompts: /nowhere: No such file"),
        (["--prompts", "/"], "--prompts: /: Is a directory"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be a number >= 0, got nan"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be a number >= 0"),
        (["--prompt", "a", "--temperature", "warm"], "--temperature"),
        (["--prompt", "a", "--top_p", "0"], "0 < top_p <= 1"),
        (["--prompt", "a", "--top_p", "nan"], "0 < top_p <= 1"),
        (["--prompt", "a", "--top_k", "-1"], "top_k >= 0"),
        (["--prompt", "a", "--min_p", "2"], "min_p <= 1"),
        (["--prompt", "a", "--seed", "-1"], "--seed"),
        (["--prompt", "a", "--seed", str(2**64)], "--seed"),
    ],
)
def test_generations_that_cannot_work(trained, arguments, message):
    refuses(message, "generate", "--workdir", trained, *arguments)


def test_prompt_files_that_cannot_be_read(trained, tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"good\nbad \xff\n")
    refuses("no UTF-8 at byte 9", "generate", "--workdir", trained, "--prompts", file)
    file.write_bytes(b"\n \n")
    refuses("nothing to continue", "generate", "--workdir", trained, "--prompts", file)


# --- damaged and foreign checkpoints --------------------------------------------------------------


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage_params(newest):
    for file in (newest / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 10)


def truncate_params(newest):
    # All of them: which file holds what is read, and which one was replaced while it was written, depends on timing.
    for file in (newest / "model" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_params(newest):
    shutil.rmtree(newest / "model")


def damage_about(newest):
    largest(newest / "about").write_text('{"model": ')


def foreign_about(newest):
    largest(newest / "about").write_text(json.dumps({"model": {"layers": 1}, "note": "of another program"}))


def newer_about(newest):
    file = largest(newest / "about")
    about = json.loads(file.read_text())
    about["model"]["quantum_layers"] = 3
    file.write_text(json.dumps(about))


def broken_tokenizer(newest):
    file = largest(newest / "about")
    about = json.loads(file.read_text()) | {"tokenizer": '{"kind": "klingon"}'}
    file.write_text(json.dumps(about))


def other_shape(newest):
    file = largest(newest / "about")
    about = json.loads(file.read_text())
    about["model"] |= {"width": 32}
    file.write_text(json.dumps(about))


DAMAGES = [
    damage_params,
    truncate_params,
    remove_params,
    damage_about,
    foreign_about,
    newer_about,
    broken_tokenizer,
    other_shape,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(run_copy, config_file, damage):
    newest = run_copy / "checkpoints" / "4"
    damage(newest)
    before = contents(run_copy)
    place = "run" if damage in (newer_about, broken_tokenizer, other_shape) else f"{newest}"
    refuses(str(newest), "evaluate", "--workdir", run_copy)
    refuses(str(newest), "generate", "--workdir", run_copy, "--prompt", "a")
    more = ["--config.training.steps=6"]
    refuses(place, "train", "--config", config_file, "--workdir", run_copy, *more)
    assert contents(run_copy) == before
    outcome = call("evaluate", "--workdir", run_copy, "--step", "2", "--batches", "1")
    assert outcome.status == 0, "the older checkpoint still serves"


def test_a_folder_that_only_looks_like_a_checkpoint(run_copy, config_file):
    (run_copy / "checkpoints" / "100").mkdir()
    (run_copy / "checkpoints" / "100" / "holiday.txt").write_text("photos")
    before = contents(run_copy)
    refuses("checkpoints/100", "generate", "--workdir", run_copy, "--prompt", "a")
    refuses("checkpoints/100", "train", "--config", config_file, "--workdir", run_copy)
    assert contents(run_copy) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=2", "holds a run with model.layers=1, but the config says 2"),
        ("data.length=16", "holds a run with data.length=32, but the config says 16"),
        ("optimizer.name=sgd", "holds a run with optimizer.name='adamw', but the config says 'sgd'"),
        ("training.average_decay=0.9", "training.average_decay=0.0, but the config says 0.9"),
        ("compute.dtype=float16", "compute.dtype='float32', but the config says 'float16'"),
        ("seed=1", "seed was 0, now it is 1"),
        ("training.steps=2", "a run at step 4, beyond config.training.steps=2"),
    ],
)
def test_a_config_that_does_not_fit_the_checkpoint(run_copy, config_file, override, message):
    before = contents(run_copy)
    refuses(message, "train", "--config", config_file, "--workdir", run_copy, f"--config.{override}")
    assert contents(run_copy) == before


def test_workdirs_that_are_no_folder(config_file, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refuses(f"{file}: could not be written", "train", "--config", config_file, "--workdir", file)
    assert file.read_text() == "mine"
