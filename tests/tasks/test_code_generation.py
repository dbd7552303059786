"""Writing functions: where a body ends, what compiles, and what the tests of a problem say of a solution."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.tokenizers import byte_level
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.measurement import code_execution
from fastlm.measurement.human_eval import read_human_eval
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks import code_generation
from fastlm.tasks.code_generation import Attempts, CodeGeneration, function_body, solve
from fastlm.tasks.kind import Trained
from fastlm.tasks.language_modeling import LanguageModeling
from tests.entry_points import call, refuses

BASICS = Path(__file__).parents[2] / "experiments" / "problems" / "basics.jsonl"
TOKENIZER = byte_level.ByteTokenizer()
PROBLEMS = read_human_eval(BASICS)
RIGHT, WRONG, BROKEN, LOOP = (
    "\n    return a + b\n\nprint(add(1))",
    "\n    return a - b\nx",
    "\n    return (",
    "\n    while 1: pass",
)


@pytest.fixture(scope="module")
def isolated():
    try:
        code_execution.run_tests(["pass"])
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def trained():
    model = Model(ModelConfig(vocab_size=260, max_length=512, layers=1, width=16, heads=2))
    params = jax.jit(model.init)(jax.random.key(0))
    task = LanguageModeling().make(model, TOKENIZER)
    return Trained(model, task, {"model": params}, TOKENIZER, meshes.make())


def writes(monkeypatch, *texts):
    """Has the model write these texts in turn, whatever it is asked."""
    left = [list(text.encode()) + [TOKENIZER.eos] for text in texts]

    def generate(model, params, rows, *, max_tokens, how, seed, **rules):
        said = [left.pop(0)[:max_tokens] for _ in rows]
        width = max(map(len, said))
        whole = np.array([row + [TOKENIZER.eos] * (width - len(row)) for row in said])
        yield from np.split(whole, range(16, width, 16), axis=1)

    monkeypatch.setattr(code_generation.sample, "generate", generate)


def test_a_body_ends_where_the_margin_is_reached():
    assert function_body("\n    return 1\n\n\ndef other():\n    pass") == "\n    return 1\n"
    assert function_body(" # why\n    return f(\n    1\n)\n# end\n    x") == " # why\n    return f(\n    1\n)\n"
    assert function_body("\n    if x:\n\n        y\n    z") == "\n    if x:\n\n        y\n    z\n"


@given(st.text("ab \n#)", max_size=40))
@settings(max_examples=100)
def test_a_body_is_where_it_ends(text):
    body = function_body(text)
    assert function_body(body) == body
    assert text.startswith(body.rstrip())
    assert all(line[:1] in ("", " ", ")") for line in body.split("\n")[1:])


def test_space_between_prompt_and_body_belongs_to_the_body():
    row = {"prompt": 'def f():\n    """Doc."""\n\n', "body": "    return 1\n"}
    assert CodeGeneration().texts(row) == ('def f():\n    """Doc."""', "\n\n    return 1\n")


def test_solutions_of_the_shipped_problems_pass_and_nothing_else_does(isolated, trained, monkeypatch):
    problems = [dataclasses.replace(p, prompt=p.prompt.rstrip()) for p in PROBLEMS]
    writes(
        monkeypatch,
        *["\n" + p.canonical_solution + "\nassert 0" for p in sorted(problems, key=lambda p: len(p.prompt))],
    )
    writing = LanguageModeling().writing(trained.model.cfg, TOKENIZER)
    scored = solve(trained, writing, PROBLEMS, Attempts(batch_size=7))
    assert scored.metrics["pass@1"] == scored.metrics["compiles"] == 1 and scored.metrics["problems"] == 20
    writes(monkeypatch, *["\n    return None"] * 20)
    assert solve(trained, writing, PROBLEMS, Attempts()).metrics["pass@1"] == 0


def test_pass_at_k_of_several_samples(isolated, trained, monkeypatch):
    writes(monkeypatch, RIGHT, WRONG, BROKEN, LOOP, RIGHT, "", "", "", *[WRONG] * 12)
    writing = LanguageModeling().writing(trained.model.cfg, TOKENIZER)
    attempts = Attempts(samples=10, how=Sampling(temperature=1.0), batch_size=20, timeout_seconds=1.0)
    scored = solve(trained, writing, [PROBLEMS[0], dataclasses.replace(PROBLEMS[0], task_id="again")], attempts)
    assert scored.metrics["pass@1"] == pytest.approx((2 / 10 + 0) / 2)
    assert scored.metrics["pass@10"] == 0.5
    assert scored.metrics["compiles"] == pytest.approx((6 / 10 + 1) / 2)
    assert [output["status"] for output in scored.outputs[:4]] == ["passed", "failed", "failed", "timed_out"]


@pytest.mark.slow
def test_a_model_that_learnt_nothing_solves_nothing(isolated, tmp_path, trained_workdir):
    asked = ["evaluate", "--workdir", trained_workdir, "--problems", tmp_path / "one.jsonl"]
    (tmp_path / "one.jsonl").write_text(
        '{"task_id": "a", "prompt": "def f():\\n    1", "entry_point": "f", "canonical_solution": "", '
        '"test": "def check(candidate):\\n    assert candidate() == 3"}\n'
    )
    refuses("--problems runs programs that the model writes (isolated); allow it", *asked)
    outcome = call(*asked, "--allow-code-execution", "--samples", "2", "--temperature", "1", "--outputs", "2")
    assert outcome.status == 0, outcome.err
    assert "pass@1 0.0000" in outcome.out and outcome.out.count('"status": "failed"') == 2
    refuses("2 samples at temperature 0 are all the same", *asked, "--allow-code-execution", "--samples", "2")


@pytest.fixture
def trained_workdir(tmp_path, no_mesh):
    config = tmp_path / "config.py"
    config.write_text(
        "from configs import lm_tiny\n\ndef get_config():\n    config = lm_tiny.get_config()\n"
        "    config.training.steps = 1\n    config.sample.prompts = ()\n    config.evaluation.final_split = ''\n"
        "    config.logging.tensorboard = False\n    return config\n"
    )
    outcome = call("train", "--config", config, "--workdir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    return tmp_path / "run"
