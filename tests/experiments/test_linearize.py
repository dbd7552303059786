"""The two stages of a conversion, what is refused before the first, and both from the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import linearize
from experiments.distill import Score
from experiments.linearize import Row
from fastlm.errors import UserError
from fastlm.measurement import workers
from fastlm.models import Model, ModelConfig
from fastlm.training.restore import Restored

CONFIG = "configs/distill/linearize.py"
ROOT = Path(__file__).parent.parent.parent
CFG = ModelConfig(vocab_size=20, max_length=16, layers=2, width=16, heads=2)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def a_teacher(tmp_path):
    (tmp_path / "teacher" / "checkpoints").mkdir(parents=True)
    return f"{CONFIG}:{tmp_path}/teacher"


def test_one_student_twice_from_its_teacher_and_from_the_first_stage(a_teacher, tmp_path):
    overrides, first = ["training.steps=30", "model.attention=linear"], ["training.steps=10", "schedule.peak=0.1"]
    blocks, whole = linearize.stages(a_teacher, overrides, first, "block", tmp_path)
    assert [(stage.name, stage.steps) for stage in (blocks, whole)] == [("blocks", 10), ("end_to_end", 30)]
    differing = {name for name in whole.config if whole.config[name] != blocks.config[name]}
    assert differing == {"init", "distilled", "training", "schedule"}
    assert blocks.config["distilled"]["terms"] == (("blocks(train='block')", 1.0),)
    assert whole.config["distilled"]["terms"][0][0] == "cross_entropy"
    assert blocks.config["init"]["source"] == f"{tmp_path}/teacher"
    begun = {name: value for name, value in whole.config["init"].items() if value}
    assert begun == {"source": f"{tmp_path}/blocks", "step": "10"}
    assert whole.config["model"] == {"attention": "linear"}


@pytest.mark.parametrize(
    ("overrides", "first", "message"),
    [
        (["wrappers=()"], [], r"config\.wrappers: has no 'distilled'"),
        (["distilled.teachers=('a',)"], [], r"config\.init\.source: a converted model starts from its teacher, but"),
        (["distilled.step=7"], [], r"config\.init\.source: .* \('.*',\) 7; name one workdir in both"),
        (["evaluation.final_split="], [], r"config\.evaluation\.final_split: the table needs scores"),
        ([], ["model.attention=linear"], r"--blocks: changes config\.model, but both stages train one student"),
        ([], ["init.step=3"], r"--blocks: changes config\.init"),
    ],
)
def test_configs_of_no_conversion(a_teacher, tmp_path, overrides, first, message):
    with pytest.raises(UserError, match=message) as caught:
        linearize.stages(a_teacher, overrides, first, "attention", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_table_has_times_beside_the_teachers():
    cfg = dataclasses.replace(CFG, attention="gated_linear")
    score = lambda bits: Score({"bits_per_byte": bits, "bits_per_byte_error": 0.02, "loss": 3.0}, [])
    rows = [
        Row("teacher", score(1.0), "", CFG, {16: 0.2, 4096: 0.8}),
        Row("student, block by block", score(1.25), "10", cfg),
        Row("student, then end to end", score(1.1), "10 + 30", cfg, {16: 0.1, 4096: 0.1}),
    ]
    lines = linearize.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| | bits_per_byte | ") and lines[0].endswith("| read 16 | read 4,096 |")
    assert lines[2].endswith("| 200.0 ms (1.00x) | 800.0 ms (1.00x) |")
    assert lines[3].startswith("| student, block by block | 1.2500 ± 0.0200 | 1.250 | 10 | ")
    assert lines[4].endswith("| 100.0 ms (2.00x) | 100.0 ms (8.00x) |")


def test_rows_longer_than_were_learned_are_read_where_weights_do_not_end(monkeypatch):
    monkeypatch.setattr(workers, "PAUSE", 0.0)
    model = Model(CFG)
    assert linearize.reading(model, 8).cfg == CFG
    params = jax.jit(model.init)(jax.random.key(0))
    found = linearize.reading_seconds([Restored(model, params, None, {}, 1)] * 2, [20], turns=2)
    assert [list(one) for one in found] == [[20], [20]] and all(one[20] > 0 for one in found)
    with pytest.raises(UserError, match=r"--lengths: the weights of this model end at 16 tokens .*'learned'"):
        linearize.reading(Model(dataclasses.replace(CFG, positions="learned")), 20)
    with pytest.raises(UserError, match="kind 'lsh' cannot run step by step"):
        linearize.reading(Model(dataclasses.replace(CFG, attention=("full", "lsh"))), 20)
    with pytest.raises(UserError, match="--lengths: needs numbers of tokens like 2048,8192, got '20,-1'"):
        linearize.lengths_of(["20", "-1"])


@pytest.mark.slow
def test_a_teacher_and_its_conversion_from_the_command_line(corpus, tmp_path):
    """Trains, converts, goes on when repeated, and refuses what cannot be before anything is trained."""
    small = [
        *("--config.data.length=32", "--config.data.batch_size=8", f"--config.data.sources=(('{corpus}',1.0),)"),
        *("--config.compute.dtype=float32", "--config.evaluation.every=10", "--config.evaluation.overlap=0"),
        *("--config.logging.tensorboard=False", "--config.sample.prompts=()", "--config.training.accumulation=1"),
    ]

    def run(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    sizes = ["--config.tokenizer.kind=bytes", "--config.model.layers=2", "--config.model.width=32"]
    sizes += ["--config.model.heads=2", "--config.model.max_length=64", "--config.training.steps=30"]
    teacher = tmp_path / "teacher"
    made = run("fastlm.train", "--config", "configs/lm_small.py", "--workdir", teacher, *small, *sizes)
    assert made.returncode == 0, made.stderr
    command = ["experiments.linearize", "--config", f"{CONFIG}:{teacher}", *small, "--config.training.steps=20"]
    for attention, message in (("full", "nothing to convert"), ("linformer(rank=4)", "cannot hide later tokens")):
        refused = run(*command, f"--config.model.attention={attention}", "--folder", tmp_path / "refused")
        assert refused.returncode == 2 and message in refused.stderr
    assert not (tmp_path / "refused").exists()
    folder = tmp_path / "converted"
    command += ["--folder", folder, "--config.model.attention=('local(window=4)','linear')"]
    begun = run(*command, "--blocks", "training.steps=10", "--lengths", "16,100")
    assert begun.returncode == 0, begun.stderr
    text = (folder / "results.md").read_text().strip()
    assert begun.stdout.strip().endswith(text)
    lines = text.splitlines()
    assert [line.split(" | ")[3].strip() for line in lines[2:]] == ["", "10", "10 + 20"]
    metrics = [json.loads(line) for line in (folder / "blocks" / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/layer_0", "validation/layer_1"} <= set().union(*metrics)
    again = run(*command, "--blocks", "training.steps=10")
    assert again.returncode == 0, again.stderr
    assert f"resuming {folder}/blocks at step 10" in again.stdout
    assert f"resuming {folder}/end_to_end at step 20" in again.stdout
    scores = lambda lines: [line.split(" | ")[1] for line in lines[2:]]
    assert scores(again.stdout.strip().splitlines()[-5:]) == scores(lines)
    longer = run(*command, "--blocks", "training.steps=15")
    assert longer.returncode == 2 and "began from step 10 of" in longer.stderr
