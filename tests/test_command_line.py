"""Overrides on the command line, and that configs and code know the same keys."""

import contextlib
import dataclasses
import inspect
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import base
from experiments import long_range
from fastlm import command_line
from fastlm.compress.distill import Distilled
from fastlm.compress.gates import Gated
from fastlm.compress.lora import Lora
from fastlm.compress.prune import Pruned
from fastlm.data import settings as data_settings
from fastlm.data import tokenizers
from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig
from fastlm.parallel import mesh
from fastlm.tasks import KINDS, make_kind
from fastlm.tasks.language_modeling import LanguageModeling
from fastlm.tasks.rows import RowsKind, default_buckets
from fastlm.training import build, initial, loop, optimizers, schedules, settings

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.stem != "__init__")
LONG_RANGE = [path for path in CONFIGS if path.parent.stem == "long_range"]
STAND_INS = {  # what is not on disk, and what the docstring offers or what that is made from
    "c4/en": "state_of_the_union",
    "cifar10": "digits",
    "jsonl:runs/augmented/*.jsonl": "state_of_the_union_passages",
    "jsonl:runs/teacher_texts/*.jsonl": "old_testament_en_es",
}
# workdir that a config starts or learns from -> the config that trains it, where that has another name
TRAINED_BY = {
    "minilm": "mlm_small",
    "classify_mlm": "classify_finetuned",
    "tinybert_general": "distill/tinybert_general",
    "classify_cut": "classify_finetuned",
    "pruned": "lm_small",
    "low_rank": "lm_small",
}
STAND_IN_LAYERS = 3

# section -> what takes its keys, and the arguments that come from elsewhere
TARGETS = {
    "task": (LanguageModeling, set()),
    "distilled": (Distilled, set()),
    "init": (initial.Init, set()),
    "lora": (Lora, set()),
    "gated": (Gated, set()),
    "pruned": (Pruned, set()),
    "model": (ModelConfig, set()),
    "compute": (Compute, set()),
    "tokenizer": (tokenizers.make, {"documents", "data_dir"}),
    "data": (data_settings.Data, set()),
    "evaluation": (data_settings.Evaluation, set()),
    "optimizer": (optimizers.make, {"learning_rate", "params"}),
    "schedule": (schedules.make, {"steps"}),
    "training": (settings.Training, set()),
    "mesh": (mesh.make, set()),
    "checkpoint": (settings.Checkpoint, set()),
    "logging": (settings.Logging, set()),
    "sample": (settings.Sample, set()),
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def changed(path, text):
    """The value at `path` of the base config after `--config.<path>=<text>`."""
    value = config = base.get_config()
    command_line.override(config, f"{path}={text}")
    for name in path.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.layers", "8", 8),
        ("model.layers", "-1", -1),
        ("schedule.peak", "3e-4", 3e-4),
        ("schedule.peak", "1", 1),
        ("schedule.warmup", "100", 100),
        ("model.heads", "(4, 8)", (4, 8)),
        ("model.attention", "('local', 'full')", ("local", "full")),
        ("model.attention", "full", "full"),
        ("model.bias", "true", True),
        ("model.bias", "False", False),
        ("model.layers", "eight", "eight"),  # its type is checked, by name, where it is used
        ("tokenizer.path", "/a=b/c.json", "/a=b/c.json"),
        ("tokenizer.path", "123", "123"),  # a string stays one
        ("tokenizer.path", "'quoted'", "quoted"),
        ("tokenizer.path", "", ""),
        ("data.data_dir", "/somewhere", "/somewhere"),
        ("data.data_dir", "None", None),
        ("data.sources", "(('text:a/*.txt', 0.5), ('python_stdlib', 0.5))", None),
        ("sample.prompts", "('a b', 'c')", ("a b", "c")),
        ("optimizer.groups", "(('embedding', {'frozen': True}),)", (("embedding", {"frozen": True}),)),
        ("seed", "7", 7),
    ],
)
def test_values_are_read_as_they_are_meant(path, text, value):
    value = (("text:a/*.txt", 0.5), ("python_stdlib", 0.5)) if path == "data.sources" else value
    assert changed(path, text) == value
    assert type(changed(path, text)) is type(value)


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.tuples(st.integers(), st.text())))
def test_what_python_prints_is_read_back(value):
    assert changed("model.heads", repr(value)) == value


def test_every_key_of_a_task_can_be_overridden_and_another_task_named():
    path = str(ROOT / "configs" / "translate_small.py")
    assert command_line.load_config(path, ["task.beams=2"])["task"]["beams"] == 2
    task = command_line.load_config(path, ["task.label=era", "task.name=classification"])["task"]
    assert (task["name"], task["label"]) == ("classification", "era") and "beams" not in task
    with pytest.raises(UserError, match="config.task has no 'labl'; did you mean 'label'"):
        command_line.load_config(path, ["task.name=classification", "task.labl=era"])
    with pytest.raises(UserError, match="unknown 'clasification'; did you mean 'classification'"):
        make_kind(command_line.load_config(path, ["task.name=clasification"])["task"])


def test_overrides_are_told_apart_from_flags():
    argv = ["train", "--config", "c.py", "--config.model.layers=2", "--profile", "--config.seed", "-3", "--workdir=w"]
    rest, found = command_line.split_overrides(argv)
    assert rest == ["train", "--config", "c.py", "--profile", "--workdir=w"]
    assert found == ["model.layers=2", "seed=-3"]
    assert command_line.split_overrides(["t", "--config=path.py:arg"]) == (["t", "--config=path.py:arg"], [])


@pytest.mark.parametrize("argv", [["--config.seed"], ["--config.seed", "--workdir=w"]])
def test_an_override_without_a_value_is_refused(argv):
    with pytest.raises(UserError, match=r"--config.seed: no value given; write --config.seed=VALUE"):
        command_line.split_overrides(argv)


def test_later_overrides_win_and_the_file_stays_as_it_was():
    changes = ["model.layers=8", "model.layers=9"]
    assert command_line.load_config("configs/base.py", changes)["model"]["layers"] == 9
    assert command_line.load_config("configs/base.py", [])["model"]["layers"] == 6


def test_an_argument_reaches_get_config(tmp_path):
    file = tmp_path / "sized.py"
    file.write_text(
        "from configs import base\n\n"
        "def get_config(size='small'):\n"
        "    config = base.get_config()\n"
        "    config.model.layers = {'small': 2, 'a:b': 12}[size]\n"
        "    return config\n"
    )
    layers = lambda path: command_line.load_config(path, [])["model"]["layers"]
    assert layers(f"{file}") == layers(f"{file}:small") == 2
    assert layers(f"{file}:a:b") == 12


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("config.model.update(dropout=0.1, pooling='first')", {"dropout": 0.1}),  # 'first' stands there anyway
        ("config.model = ConfigDict({'dropout': 0.0})", {"dropout": 0.0}),
    ],
)
def test_of_a_model_that_starts_from_another_only_what_is_said_counts(section, said, tmp_path):
    file = tmp_path / "started.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\nfrom configs import base\n\n"
        f"def get_config():\n    config = base.get_config()\n    {section}\n    return config\n"
    )
    start = ["init.source=runs/base"]
    model = lambda *changes: command_line.load_config(str(file), list(changes))["model"]
    assert model(*start) == said
    assert model(*start, "model.pooling=first", "model.bias=False") == said | {"pooling": "first", "bias": False}
    assert model(*start, "model.dropout=0.0") == {"dropout": 0.0}
    assert model("model.pooling=mean") == base.get_config().model.to_dict() | said | {"pooling": "mean"}
    with pytest.raises(UserError, match="config.model has no 'poolin'; did you mean 'pooling'"):
        model(*start, "model.poolin=first")


@pytest.mark.parametrize("section", TARGETS)
def test_base_has_every_key_of_every_section_and_no_other(section):
    target, from_elsewhere = TARGETS[section]
    keys = set(base.get_config()[section]) - ({"name"} if section == "task" else set())
    assert keys == set(inspect.signature(target).parameters) - from_elsewhere


def test_base_has_every_section():
    assert set(base.get_config()) == set(build.SECTIONS)
    assert set(TARGETS) == {name for name, value in base.get_config().items() if isinstance(value, ConfigDict)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_override_values_and_add_no_keys(path):
    check_keys(command_line.load_config(str(path), []))
    assert "launch/local.sh -m fastlm.train --config" in path.read_text() or path.stem == "base"
    assert path.stem == "base" or len(path.read_text().splitlines()) <= 40


def check_keys(config):
    assert set(config) == set(base.get_config())
    for section, values in base.get_config().to_dict().items():
        if section == "task":  # whose keys are those of the kind it names
            kind = KINDS[config["task"]["name"]]
            assert config["task"].keys() - {"name"} <= {field.name for field in dataclasses.fields(kind)}
        elif section == "model" and config["init"]["source"]:  # what is said of it; the rest is the source's
            assert config[section].keys() <= values.keys()
        elif isinstance(values, dict):
            assert config[section].keys() == values.keys()


@pytest.mark.parametrize("path", LONG_RANGE, ids=lambda path: path.stem)
def test_sizes_of_the_paper_are_larger(path):
    """And fit together; that they build is for the slow test."""
    small, paper = (command_line.load_config(f"{path}{size}", []) for size in ("", ":paper"))
    check_keys(paper)
    for config in (small, paper):
        assert config["data"]["length"] <= config["model"]["max_length"]
        assert not config["data"]["buckets"] or config["data"]["buckets"][-1] == config["data"]["length"]
    tokens = [c["training"]["steps"] * c["data"]["batch_size"] * c["data"]["length"] for c in (small, paper)]
    assert tokens[0] < tokens[1]


@pytest.mark.parametrize("task", long_range.TASKS)
def test_long_range_models_take_every_kind_that_their_runner_gives_them(task):
    for size in ("", ":paper"):
        config = command_line.load_config(f"{long_range.CONFIGS / task}.py{size}", [])
        for kind in long_range.bidirectional():
            changes = {"vocab_size": 258, "classes": 2, "attention": long_range.SPECS.get(kind, kind)}
            Model(ModelConfig(**config["model"] | changes))


def stand_in(workdir, tmp_path):
    """A workdir like one that a config starts or learns from, after one step of a narrow model."""
    name = workdir.removeprefix("runs/")
    path, made = str(ROOT / "configs" / f"{TRAINED_BY.get(name, name)}.py"), tmp_path / name
    if made.exists():
        return str(made)
    changes = [
        "wrappers=()",
        "training.steps=1",
        "training.accumulation=1",
        "evaluation.every=0",
        "evaluation.final_split=",
        "evaluation.batches=1",
        "data.batch_size=4",
        "sample.prompts=()",
        "logging.tensorboard=False",
    ]
    if not command_line.load_config(path, [])["init"]["source"]:
        changes += [f"model.layers={STAND_IN_LAYERS}", "model.width=32", "model.heads=4"]
        changes += ["model.feed_forward_width=1536"] if name == "minilm" else []
    config = command_line.load_config(path, changes)
    replace_what_is_not_here(config, tmp_path)
    loop.run(build.build(config, made), say=lambda text: None)
    return str(made)


def replace_what_is_not_here(config, tmp_path):
    """Gives a config other data, and other workdirs to start and to learn from."""
    (source, _), *_ = config["data"]["sources"]
    if source in STAND_INS:
        config["data"].update(sources=((STAND_INS[source], 1.0),), split="train")
        config["evaluation"]["split"] = "validation"
    elif source.endswith("_paper"):  # the same rows, but longer or more: minutes to make
        config["data"]["sources"] = ((source.removesuffix("_paper"), 1.0),)
    if config["init"]["source"]:
        config["init"]["source"] = stand_in(config["init"]["source"], tmp_path)
    if config["tokenizer"]["kind"] == "checkpoint":
        config["tokenizer"]["path"] = stand_in(config["tokenizer"]["path"], tmp_path)
    if "distilled" in config["wrappers"]:
        config["distilled"]["teachers"] = tuple(stand_in(one, tmp_path) for one in config["distilled"]["teachers"])


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, tmp_path, no_mesh, monkeypatch):
    check_builds(str(path), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", LONG_RANGE, ids=lambda path: path.stem)
def test_sizes_of_the_paper_build(path, tmp_path, no_mesh, monkeypatch):
    check_builds(f"{path}:paper", tmp_path, monkeypatch)


def check_builds(path, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    config = command_line.load_config(path, [])
    replace_what_is_not_here(config, tmp_path)
    experiment = build.build(config, tmp_path / "run")
    assert experiment.model.cfg.vocab_size >= experiment.tokenizer.vocab_size
    batches = experiment.train_batches()
    if config["init"]["source"]:
        layers = config["model"].get("layers", STAND_IN_LAYERS)
        assert experiment.model.cfg.layers == layers, "the architecture is that of the start"
    with contextlib.closing(batches):
        rows, length = next(batches)["tokens"].shape
    assert rows == experiment.data.batch_size
    if isinstance(experiment.kind, RowsKind):
        assert length in (experiment.data.buckets or default_buckets(experiment.data.length))
    else:
        assert length == experiment.data.length
    assert not (tmp_path / "run").exists(), "building writes nothing"
