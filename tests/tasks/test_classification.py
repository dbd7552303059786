"""Classification: labels from the data, pairs, masks, metrics, and that it learns."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm import tasks
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks import classification
from fastlm.tasks.kind import Trained
from fastlm.tasks.rows import Joiner, default_buckets
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step
from tests.tasks.unlabelled import says_the_same

TOKENIZER = byte_level.ByteTokenizer()
KIND = classification.Classification(labels=("no", "yes"))


def config(**changes):
    return ModelConfig(
        family="encoder", head="none", vocab_size=300, max_length=32, layers=1, width=32, heads=4, **changes
    )


@pytest.fixture
def rows(tmp_path):
    """Texts with an x are "yes"; the split is a field."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(48):
        letters = [str(c) for c in rng.choice(list("abcdef"), int(rng.integers(3, 20)))]
        if i % 3 == 0:
            letters[int(rng.integers(len(letters)))] = "x"
        row = {
            "split": "test" if i >= 32 else "train",
            "text": "".join(letters),
            "label": "yes" if i % 3 == 0 else "no",
        }
        lines.append(json.dumps(row))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return Data(sources=((f"jsonl:{path}", 1.0),), length=16, batch_size=8, data_dir=str(tmp_path / "data"), prefetch=0)


def test_labels_are_found_in_the_training_rows_and_kept(rows):
    kind = classification.Classification().resolve(rows)
    assert kind.labels == ("no", "yes")
    assert tasks.make_kind(tasks.describe_kind(kind)) == kind
    cfg = kind.fit(config(), TOKENIZER, rows)
    assert (cfg.head, cfg.classes) == ("sequence", 2)
    assert kind.fit(ModelConfig(vocab_size=300), TOKENIZER, rows).pooling == "last"


def test_learning_scoring_and_evaluation_agree(rows, tmp_path):
    cfg = KIND.fit(config(pooling="mean"), TOKENIZER, rows)
    model = Model(cfg)
    task, optimizer = KIND.make(model, TOKENIZER), optax.adam(1e-2)
    current = state.create(
        task, model, optimizer, seed=0, rows=8, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    step, batches = jax.jit(make_train_step(task, optimizer)), KIND.train_batches(cfg, TOKENIZER, rows, 0)
    for _ in range(120):
        batch = {k: v for k, v in next(batches).items() if k not in ("record", "epoch")}
        current, metrics = step(current, task.constants, batch)
    assert float(metrics["sums/nll"]) / 8 < 0.3
    batches.close()

    trained = Trained(model, task, current.params, TOKENIZER, meshes.make())
    scored = KIND.score(trained, rows, Evaluation(batch_size=8), "test")
    assert scored.metrics["rows"] == 16
    assert scored.metrics["accuracy"] > 0.7
    assert [output["label"] for output in scored.outputs] == ["yes" if i % 3 == 0 else "no" for i in range(32, 48)]
    right = np.mean([output["label"] == output["said"] for output in scored.outputs])
    assert scored.metrics["accuracy"] == pytest.approx(right)
    assert says_the_same(KIND, trained, rows, Evaluation(batch_size=8), scored, tmp_path)

    evaluate, totals = jax.jit(make_eval_step(task)), 0
    for batch in KIND.eval_batches(cfg, TOKENIZER, rows, Evaluation(batch_size=8), "test", 0):
        batch = {k: jnp.asarray(v) for k, v in batch.items() if k not in ("record", "epoch")}
        _, sums = evaluate(current.params, (), task.constants, (), batch, current.step)
        totals = totals + np.asarray(sums["confusion"])
    assert np.trace(totals) / totals.sum() == pytest.approx(right)
    assert totals.sum() == 16


def test_summarize_by_hand():
    metrics = classification.summarize({"nll": 4 * np.log(2), "confusion": np.array([[2.0, 1.0], [0.0, 1.0]])})
    assert metrics["loss"] == pytest.approx(np.log(2))
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert classification.summarize({"nll": 0.0, "confusion": np.zeros((2, 2))})["macro_f1"] == 0.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("abc", None, b"abc"),
        ("abcdefghij", None, b"abcdef"),
        ("abc", "xy", b"abc|xy"),
        ("abcdefgh", "xy", b"abc|xy"),
        ("ab", "uvwxyz", b"ab|uvw"),
        ("abcdefgh", "stuvwxyz", b"ab|stu"),
    ],
)
def test_texts_are_joined_and_the_longer_one_is_cut(first, second, expected):
    join = Joiner(TOKENIZER, 8)
    tokens, types, cut = join(first, second)
    end = TOKENIZER.eos
    opening = [] if TOKENIZER.bos is None else [TOKENIZER.bos]
    parts = expected.split(b"|")
    assert len(tokens) <= 8
    assert len(tokens) == len(types)
    shorter = len(expected.replace(b"|", b"")) < len(first + (second or ""))
    assert cut == (("texts at their end, to config.data.length=8 tokens",) if shorter else ())
    assert tokens.tolist() == opening + [t for part in parts for t in [*part, end]]
    assert types.tolist() == [0] * (len(opening) + len(parts[0]) + 1) + [1] * (len(parts[1]) + 1 if second else 0)


def test_default_buckets():
    assert default_buckets(128) == (32, 64, 128)
    assert default_buckets(1) == (1,)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"text": "txt"}, "has no field 'txt'.*did you mean 'text'"),
        ({"label": "text"}, ""),
        ({"labels": ("no", "maybe")}, "unknown label 'yes'"),
    ],
)
def test_wrong_fields_and_labels_are_named(rows, kind, message):
    kind = classification.Classification(**kind)
    if kind.label == "text":
        assert len(kind.resolve(rows).labels) > 20
        return
    with pytest.raises(UserError, match=message):
        kind = kind.resolve(rows)
        next(kind.train_batches(kind.fit(config(), TOKENIZER, rows), TOKENIZER, rows, 0))


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="named twice"):
        classification.Classification(labels=("a", "a"))
    with pytest.raises(UserError, match="label_smoothing"):
        classification.Classification(label_smoothing=1.0)
    with pytest.raises(UserError, match="'encoder_decoder' cannot do this task"):
        two = dataclasses.replace(config(), family="encoder_decoder", head="language_model", encoder_layers=1)
        KIND.fit(two, TOKENIZER, None)
