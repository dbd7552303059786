"""Regression: scale from the data, sums that add up, correlations, targets that are none, and that it learns."""

import json

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks import regression
from fastlm.tasks.kind import Trained
from fastlm.tasks.scoring import evaluate
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step
from tests.tasks.unlabelled import says_the_same

TOKENIZER = byte_level.ByteTokenizer()
CFG = ModelConfig(
    family="encoder", head="none", vocab_size=300, max_length=32, layers=1, width=32, heads=4, pooling="mean"
)
EVALUATION = Evaluation(batch_size=8)


def data(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ((f"jsonl:{path}", 1.0),)
    return Data(sources=sources, length=16, batch_size=8, data_dir=str(folder / "data"), prefetch=0)


@pytest.fixture
def rows(tmp_path):
    """How many letters of a text are x, times ten, plus 1800."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abx"), 10)) for _ in range(60)]
    return data(
        tmp_path,
        [
            {"split": "test" if i >= 40 else "train", "text": text, "year": 1800 + 10 * text.count("x")}
            for i, text in enumerate(texts)
        ],
    )


def test_mean_and_scale_come_from_the_training_rows(rows):
    years = [
        1800 + 10 * row["text"].count("x") for row in regression.Regression(target="year").load(rows, "train")[0][0]
    ]
    kind = regression.Regression(target="year").resolve(rows)
    assert (kind.mean, kind.scale) == (pytest.approx(np.mean(years)), pytest.approx(np.std(years)))
    given = regression.Regression(target="year", mean=1850.0, scale=50.0)
    assert given.resolve(rows) is given
    cfg = kind.fit(CFG, TOKENIZER, rows)
    assert (cfg.head, cfg.classes) == ("sequence", 1)
    batch = next(given.eval_batches(cfg, TOKENIZER, rows, EVALUATION, "test", 0))
    assert batch["target"].dtype == np.float32
    np.testing.assert_allclose(batch["target"], [(10 * (t == ord("x")).sum() - 50) / 50 for t in batch["tokens"]])


def test_it_learns_and_scoring_agrees_with_evaluation(rows, tmp_path):
    kind = regression.Regression(target="year").resolve(rows)
    cfg = kind.fit(CFG, TOKENIZER, rows)
    model = Model(cfg)
    task, optimizer = kind.make(model, TOKENIZER), optax.adam(1e-2)
    current = state.create(
        task, model, optimizer, seed=0, rows=8, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    step, batches = jax.jit(make_train_step(task, optimizer)), kind.train_batches(cfg, TOKENIZER, rows, 0)
    for _ in range(120):
        batch = {k: v for k, v in next(batches).items() if k not in ("record", "epoch")}
        current, _ = step(current, task.constants, batch)
    batches.close()

    trained = Trained(model, task, current.params, TOKENIZER, meshes.make())
    scored = kind.score(trained, rows, EVALUATION, "test")
    assert scored.metrics["rows"] == 20 == len(scored.outputs)
    assert scored.metrics["pearson"] > 0.8
    assert scored.metrics["spearman"] > 0.8, scored.metrics
    assert says_the_same(kind, trained, rows, EVALUATION, scored, tmp_path)
    expected = np.array([output["expected"] for output in scored.outputs])
    assert all(output["expected"] == 1800 + 10 * output["text"].count("x") for output in scored.outputs)
    errors = np.array([output["said"] for output in scored.outputs]) - expected
    assert scored.metrics["root_mean_squared_error"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert scored.metrics["root_mean_squared_error"] < 0.6 * np.std(expected)

    # Sums over batches of any size, here with filling rows, give what all rows at once give.
    batches = kind.eval_batches(cfg, TOKENIZER, rows, EVALUATION, "test", 0)
    eval_step = jax.jit(make_eval_step(task))
    metrics = evaluate(eval_step, task, current.params, (), current.step, batches, trained.mesh)
    assert metrics.pop("loss") == pytest.approx(np.mean(errors**2) / kind.scale**2, rel=1e-4)
    assert set(metrics) == {"mean_absolute_error", "root_mean_squared_error", "pearson"}
    for name, value in metrics.items():
        assert value == pytest.approx(scored.metrics[name], rel=1e-4)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=30))
def test_moments_give_the_correlation_of_the_rows(pairs):
    said, wanted = np.array(pairs, np.float64).T / 50
    sums = {"rows": len(said), "said": said.sum(), "wanted": wanted.sum(), "product": said @ wanted}
    sums |= {"said2": said @ said, "wanted2": wanted @ wanted}
    sums |= {"squared": ((said - wanted) ** 2).sum(), "absolute": np.abs(said - wanted).sum()}
    metrics = regression.summarize(sums, 50.0)
    if min(np.std(said), np.std(wanted)) > 1e-3:
        assert metrics["pearson"] == pytest.approx(np.corrcoef(said, wanted)[0, 1], abs=1e-6)
    assert metrics["mean_absolute_error"] == pytest.approx(50 * np.mean(np.abs(said - wanted)))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_ranks_are_places_in_order_and_equal_values_share_theirs(values):
    ranks = regression.ranks(np.array(values))
    for value, rank in zip(values, ranks):
        below, equal = sum(v < value for v in values), values.count(value)
        assert rank == below + (equal + 1) / 2


def test_scores_by_hand():
    wanted = np.array([1.0, 2.0, 3.0, 4.0])
    metrics = regression.score(np.array([1.0, 2.0, 3.0, 104.0]), wanted)
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 104], wanted)[0, 1])
    assert metrics["pearson"] < 0.9
    assert metrics["mean_absolute_error"] == 25
    assert metrics["root_mean_squared_error"] == 50
    # The error of a root is that of its square over twice the root.
    assert metrics["root_mean_squared_error_error"] == pytest.approx(np.std([0, 0, 0, 1e4], ddof=1) / 2 / 100)
    assert regression.score(np.full(4, 0.1), wanted)["pearson"] == 0.0


@pytest.mark.parametrize("value", ["eighteen", "", "nan", "inf"])
def test_a_target_that_is_no_number_names_the_row(tmp_path, value):
    made = data(tmp_path, [{"split": "train", "text": "a\nb", "year": year} for year in ("1801", "1802", value)])
    with pytest.raises(UserError, match=r"row 2 of .*: its year, '.*', is no number") as raised:
        regression.Regression(target="year").resolve(made)
    assert repr(value) in str(raised.value)
    kind = regression.Regression(target="year", mean=1800.0, scale=1.0)
    with pytest.raises(UserError, match=r"row that begins 'a\\nb': its year") as raised:
        kind.eval_batches(kind.fit(CFG, TOKENIZER, made), TOKENIZER, made, EVALUATION, "train", 0)
    assert "\n" not in str(raised.value)


def test_settings_and_data_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="no scale below 0"):
        regression.Regression(scale=-1.0)
    same = data(tmp_path, [{"split": "train", "text": "a", "year": 1.1}] * 3)
    with pytest.raises(UserError, match=r"'year' is 1\.1 in all 3 training rows"):
        regression.Regression(target="year").resolve(same)
    with pytest.raises(UserError, match="no field 'yaer'.*did you mean 'year'"):
        regression.Regression(target="yaer").resolve(same)
