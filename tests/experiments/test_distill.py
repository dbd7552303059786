"""What the comparison of students trains, and what it makes of their scores."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import distill
from experiments.distill import ALONE, DISTILLED, EQUAL_TIME, Score
from fastlm import command_line
from fastlm.errors import UserError
from fastlm.training import build, loop

CONFIG = "configs/distill/language_model.py"
ROOT = Path(__file__).parent.parent.parent


def test_three_students_a_seed_alike_but_for_teacher_and_steps(tmp_path):
    wanted = distill.arms(CONFIG, ["training.steps=100"], [0, 1], tmp_path, 100, 130)
    assert [(arm.name, arm.seed) for arm in wanted] == [
        (name, seed) for seed in (0, 1) for name in (DISTILLED, ALONE, EQUAL_TIME)
    ]
    first = {arm.name: arm.arguments for arm in wanted[:3]}
    assert "--config.wrappers=()" not in first[DISTILLED]
    assert {"--config.wrappers=()", "--config.training.steps=100"} <= set(first[ALONE])
    assert first[EQUAL_TIME][-2:] == ("--config.training.steps=130", "--config.seed=0")
    assert len({arm.workdir for arm in wanted}) == 6


def language_model(shift, seed):
    nats = np.random.default_rng(seed).gamma(5.0, 20.0, 21) + shift
    outputs = [{"document": i, "nll": float(n), "bytes": 100.0, "tokens": 30.0} for i, n in enumerate(nats)]
    bits = nats.sum() / np.log(2) / 2100
    return Score({"bits_per_byte": float(bits), "loss": float(nats.mean())}, outputs)


def test_differences_are_paired_by_document_and_seed():
    """The same documents with three nats less each: the interval is narrow, though documents differ widely."""
    better, worse = ([language_model(shift, seed) for seed in (0, 1, 2)] for shift in (0.0, 3.0))
    text = distill.difference("bits_per_byte", better, worse)
    gain = -3 / np.log(2) / 100
    assert text == f"{gain:+.4f} [{gain:+.4f}, {gain:+.4f}]"
    found = {DISTILLED: better, ALONE: worse}
    table = distill.table(found, language_model(-5, 0), {DISTILLED: 10, ALONE: 10}, {DISTILLED: 0.2, ALONE: 0.1})
    assert "| distilled | " in table and "| 10 | 0.200 |  |" in table
    assert f"| 10 | 0.100 | {gain:+.4f} [" in table
    assert "seeds: " in table


def test_answers_are_compared_by_whether_they_are_right():
    said = lambda right: [{"said": "a" if i < right else "b", "label": "a"} for i in range(10)]
    one, other = (Score({"accuracy": right / 10, "loss": 1.0}, said(right)) for right in (9, 7))
    assert distill.metric_of([one, other]) == "accuracy"
    assert distill.difference("accuracy", [one], [other]).startswith("+0.2000 [")
    article = {"said": "The cat.", "expected": "a cat", "or": ["cats"]}  # as SQuAD counts
    assert distill.EXAMPLES["exact_match"](article) == (1.0, 1.0)


def test_scores_without_examples_have_no_interval_and_others_are_refused():
    one, other = Score({"bleu": 20.0}, []), Score({"bleu": 18.0}, [])
    assert distill.difference("bleu", [one], [other]) == "+2.0000 (no interval)"
    with pytest.raises(UserError, match="no score in common"):
        distill.metric_of([one, Score({"chrf": 1.0}, [])])


def test_other_settings_want_another_folder(tmp_path):
    path = tmp_path / "steps.json"
    assert distill._once(path, {"a": 1}, lambda: {"distilled": 1.0}) == {"distilled": 1.0}
    assert distill._once(path, {"a": 1}, lambda: 1 / 0) == {"distilled": 1.0}
    with pytest.raises(UserError, match="name another --folder"):
        distill._once(path, {"a": 2}, dict)


@pytest.mark.slow
def test_a_teacher_and_its_students_from_the_command_line(corpus, tmp_path):
    """Trains a teacher, distils it by its config, compares, and refuses a teacher whose weights have changed."""
    small = [
        *("--config.data.length=32", "--config.data.batch_size=8", f"--config.data.sources=(('{corpus}',1.0),)"),
        *("--config.compute.dtype=float32", "--config.evaluation.every=10", "--config.evaluation.overlap=0"),
        *("--config.logging.tensorboard=False", "--config.sample.prompts=()", "--config.training.accumulation=1"),
        *("--config.model.max_length=64", "--config.evaluation.batch_size=8", "--config.mesh.data=-1"),
    ]

    def run(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    teacher = [
        "--config.tokenizer.kind=bytes",
        "--config.model.layers=2",
        "--config.model.width=32",
        "--config.model.heads=2",
        "--config.training.steps=40",
    ]
    made = run("fastlm.train", "--config", "configs/lm_small.py", "--workdir", tmp_path / "teacher", *small, *teacher)
    assert made.returncode == 0, made.stderr
    student = [
        *(f"--config.tokenizer.path={tmp_path}/teacher", f"--config.distilled.teachers=('{tmp_path}/teacher',)"),
        *("--config.model.layers=1", "--config.model.width=16", "--config.model.heads=2", "--config.training.steps=20"),
        "--config.model.feed_forward_width=32",
    ]
    command = ["experiments.distill", "--config", CONFIG, *small, *student]
    compared = run(*command, "--compare", "--seeds", "0,1", "--folder", tmp_path / "compared")
    assert compared.returncode == 0, compared.stderr
    assert "| alone, equal time | " in compared.stdout
    assert compared.stdout.strip().endswith((tmp_path / "compared" / "results.md").read_text().strip())
    steps = (tmp_path / "compared" / "distilled" / "seed0" / "metrics.jsonl").read_text().splitlines()
    evaluated = [json.loads(line) for line in steps if "validation/kl" in line]
    assert {"validation/teacher_loss", "validation/agreement", "validation/term_forward_kl"} <= set(evaluated[-1])
    alone = run(*command, "--workdir", tmp_path / "student", "--config.training.steps=10")
    assert alone.returncode == 0, alone.stderr
    again = run(
        "fastlm.train",
        "--config",
        "configs/lm_small.py",
        "--workdir",
        tmp_path / "teacher",
        *small,
        *teacher,
        "--config.training.steps=50",
    )
    assert again.returncode == 0, again.stderr
    refused = run(*command, "--workdir", tmp_path / "student", "--config.training.steps=20")
    assert refused.returncode == 2
    assert "whose weights are not those of" in refused.stderr
    folder = tmp_path / "targets"
    cached = [
        f"--config.distilled.cache={folder}",
        "--config.distilled.terms=(('cross_entropy',0.5),('cached_kl',0.5))",
    ]
    written = run("experiments.teacher_targets", *command[1:], "--folder", folder, "--method", "sampled(draws=4)")
    assert written.returncode == 0, written.stderr
    assert "bytes/token" in written.stdout
    learned = run(*command, *cached, "--config.distilled.teachers=()", "--workdir", tmp_path / "from_cache")
    assert learned.returncode == 0, learned.stderr
    shuffled = run(*command, *cached, "--workdir", tmp_path / "other", "--config.seed=5")
    assert shuffled.returncode == 2 and "the cached targets there are of another data." in shuffled.stderr
    nothing = run("experiments.distill", "--config", "configs/lm_tiny.py")
    assert nothing.returncode == 2 and "has no 'distilled'" in nothing.stderr


@pytest.mark.slow
def test_a_student_with_tokens_of_its_own_is_trained_and_evaluated(corpus, tmp_path, one_device):
    """Training and evaluation batches have the teacher's tokens too; what the teacher needs for the text is said."""
    small = [
        *("data.length=32", "data.batch_size=4", f"data.sources=(('{corpus}',1.0),)", "model.layers=1"),
        *("model.width=16", "model.heads=2", "training.steps=2", "training.accumulation=1", "evaluation.every=1"),
        *("evaluation.overlap=0", "evaluation.batches=1", "sample.prompts=()", "logging.tensorboard=False"),
    ]

    def trained(config, name, *more):
        values = command_line.load_config(str(ROOT / "configs" / config), [*small, *more])
        loop.run(build.build(values, tmp_path / name), say=lambda text: None)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [found for line in lines if "validation/loss" in (found := json.loads(line))]

    trained("lm_small.py", "teacher", "tokenizer.kind=bytes")
    own = "tokenizer.vocab_size=280", f"distilled.teachers=('{tmp_path}/teacher',)"
    for found in trained("distill/other_tokenizer.py", "student", *own):
        assert found["validation/aligned"] > 0.9  # tokens of a BPE are made of bytes
        assert 5 < found["validation/teacher_bits_per_aligned_byte"] < 9  # it has learned nothing yet, of 257 tokens
        assert found["validation/term_span_likelihood"] > 0 and found["validation/term_shared_tokens"] > 0
