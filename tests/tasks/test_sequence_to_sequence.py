"""From text to text: what a row becomes, what is scored, and both families learn to reverse words."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from fastlm.data.encoded import log_once
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks.kind import Trained
from fastlm.tasks.scoring import to_device
from fastlm.tasks.sequence_to_sequence import SequenceToSequence, summarize
from fastlm.training import precision, state
from fastlm.training.step import make_train_step
from tests.tasks.unlabelled import says_the_same

TOKENIZER = byte_level.ByteTokenizer()
END = TOKENIZER.eos
PAIRS = ["ab", "bcd", "cda", "dd", "acb", "bad", "cab", "dab"]
MODELS = {
    "encoder_decoder": ModelConfig(
        family="encoder_decoder",
        encoder_layers=1,
        vocab_size=260,
        max_length=32,
        layers=1,
        width=32,
        heads=4,
        init_scale=0.15,
        positions="learned",
    ),
    "decoder": ModelConfig(vocab_size=260, max_length=32, layers=1, width=32, heads=4, init_scale=0.15),
}
KIND = SequenceToSequence(source="from", target="to", separator="=", scores=("exact", "chrf"), beams=2)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"split": s, "from": word, "to": word[::-1]} for s in ("train", "test") for word in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(sources=((f"jsonl:{path}", 1.0),), length=12, batch_size=8, data_dir=str(tmp_path / "d"), prefetch=0)


def test_a_row_of_an_encoder_decoder(data):
    encoded = KIND.encoder(MODELS["encoder_decoder"], TOKENIZER, data)({"from": "ab", "to": "xyz"})
    assert encoded["source"].tolist() == [97, 98, END]
    assert encoded["tokens"].tolist() == [KIND.start_token(TOKENIZER), *b"xyz"]
    assert encoded["targets"].tolist() == [*b"xyz", END]
    assert not encoded["cut"]
    long = dict(KIND.encoder(MODELS["encoder_decoder"], TOKENIZER, data)({"from": "a" * 50, "to": "b" * 50}))
    assert [limit.split(",")[0] for limit in long.pop("cut")] == ["sources at their end", "targets at their end"]
    assert {name: len(ids) for name, ids in long.items()} == {"source": 12, "tokens": 12, "targets": 12}
    assert long["targets"][-1] == long["source"][-1] == END


def test_a_row_of_a_decoder_is_scored_on_its_target_only(data):
    encoded = KIND.encoder(MODELS["decoder"], TOKENIZER, data)({"from": "ab", "to": "xyz"})
    opening = [] if TOKENIZER.bos is None else [TOKENIZER.bos]
    whole = [*opening, *b"ab=xyz", END]
    assert encoded["tokens"].tolist() == whole[:-1]
    assert encoded["targets"].tolist() == whole[1:]
    assert encoded["targets"][encoded["scored"] > 0].tolist() == [*b"xyz", END]


@pytest.mark.parametrize(
    ("family", "lengths", "limits"),
    [
        (
            "encoder_decoder",
            {},
            ["sources at their end, to config.data.length=12", "targets at their end, to config.data.length=12"],
        ),
        (
            "decoder",
            {},
            [
                "sources at their beginning, to half of config.data.length=12",
                "targets at their end, to what sources leave of config.data.length=12",
            ],
        ),
        (
            "decoder",
            {"source_length": 4, "length": 32},
            ["sources at their beginning, to config.data.source_length=4"],
        ),
    ],
)
def test_how_many_rows_were_cut_is_said_by_every_run(tmp_path, caplog, family, lengths, limits):
    path = tmp_path / "rows.jsonl"
    rows = [{"split": "train", "from": "a" * n, "to": "b" * n} for n in (1, 20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ((f"jsonl:{path}", 1.0),)
    data = Data(sources=sources, length=12, batch_size=2, data_dir=str(tmp_path / "d"), prefetch=0)
    data = dataclasses.replace(data, **lengths)
    for _ in range(2):
        log_once.cache_clear()
        KIND.train_batches(MODELS[family], TOKENIZER, data, 0).close()
    said = [record.getMessage().split(": ", 1)[1] for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["; ".join(f"1 of 2 rows are cut: {limit} tokens" for limit in limits)] * 2


@pytest.mark.parametrize("family", MODELS)
def test_it_learns_writes_and_is_scored(family, data, tmp_path):
    model = Model(MODELS[family])
    assert KIND.fit(model.cfg, TOKENIZER, data) == model.cfg
    task, optimizer = KIND.make(model, TOKENIZER), optax.adam(1e-2)
    current = state.create(
        task, model, optimizer, seed=0, rows=8, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    mesh = meshes.make()
    step, batches = jax.jit(make_train_step(task, optimizer)), KIND.train_batches(model.cfg, TOKENIZER, data, 0)
    for _ in range(200):
        # Waited for: eight devices on few cores whose steps pile up wait for each other longer than XLA lets them.
        current, metrics = jax.block_until_ready(step(current, task.constants, to_device(next(batches), mesh)))
    batches.close()
    assert summarize({name[5:]: float(v) for name, v in metrics.items() if name.startswith("sums/")})["accuracy"] > 0.95
    trained = Trained(model, task, current.params, TOKENIZER, mesh)
    scored = KIND.score(trained, data, Evaluation(batch_size=8), "test")
    assert scored.metrics["exact"] >= 0.75
    assert scored.metrics["rows"] == 8
    assert [output["source"] for output in scored.outputs] == PAIRS
    right = np.mean([output["said"] == output["expected"] for output in scored.outputs])
    assert scored.metrics["exact"] == right
    assert says_the_same(KIND, trained, data, Evaluation(batch_size=8), scored, tmp_path)


def test_padding_changes_no_loss(data):
    model = Model(MODELS["encoder_decoder"])
    task = KIND.make(model, TOKENIZER)
    params = {"model": jax.jit(model.init)(jax.random.key(0))}
    encode = KIND.encoder(model.cfg, TOKENIZER, data)
    rows = [encode({"from": a, "to": b}) for a, b in (("ab", "dcba"), ("abcd", "a"))]

    def batch(width):
        made = {}
        for name in ("source", "tokens", "targets"):
            made[name] = np.stack([np.pad(row[name], (0, width - len(row[name]))) for row in rows])
            made[f"{name}_length"] = np.array([len(row[name]) for row in rows], np.int32)
        return made | {"row_mask": np.ones(2, np.float32)}

    loss = jax.jit(lambda b: task.loss(params, task.constants, (), b, 0, None)[:2])
    (total, count), (wide_total, wide_count) = loss(batch(6)), loss(batch(11))
    assert float(count) == float(wide_count) == 5 + 2
    assert float(total) == pytest.approx(float(wide_total), rel=1e-5)


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="unknown 'blue'; did you mean 'bleu'"):
        SequenceToSequence(scores=("blue",))
    with pytest.raises(UserError, match="beams: must be at least 1"):
        SequenceToSequence(beams=0)
    with pytest.raises(UserError, match="'encoder' cannot do this task"):
        KIND.fit(ModelConfig(family="encoder", head="none", vocab_size=300), TOKENIZER, None)


@pytest.mark.parametrize(
    ("family", "lengths", "changes", "message"),
    [
        (
            "decoder",
            {"source_length": 12},
            {},
            "source_length: 12 leaves no room for a target in config.data.length 12",
        ),
        ("decoder", {"source_length": 13}, {}, "source_length: 13 leaves no room"),
        ("decoder", {"length": 1}, {}, "source_length: 1 leaves no room for a target in config.data.length 1"),
        (
            "encoder_decoder",
            {"source_length": 33},
            {},
            r"config\.data\.source_length: 33 is more than config\.model\.max_length 32",
        ),
        (
            "decoder",
            {},
            {"attention": ("full", "local(window=4)"), "layers": 2},
            r"config\.task\.beams: .* 2; config\.model\.attention: beam .* layer 1 has 'local",
        ),
        (
            "encoder_decoder",
            {},
            {"cross_attention": "linformer(rank=4)"},
            r"config\.task\.beams: .* 2; config\.model\.cross_attention: kind 'linformer",
        ),
        (
            "encoder_decoder",
            {},
            {"cross_attention": "linear"},
            r"config\.task\.beams: .* 2; config\.model\.cross_attention: beam .* layer 1 has 'linear'",
        ),
    ],
)
def test_runs_that_could_not_be_scored_are_refused_at_once(data, family, lengths, changes, message):
    cfg = dataclasses.replace(MODELS[family], **changes)
    with pytest.raises(UserError, match=message) as raised:
        KIND.check_scoring(Model(KIND.fit(cfg, TOKENIZER, dataclasses.replace(data, **lengths))))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lengths", [{"source_length": 11}, {"length": 2}])
def test_the_longest_that_fit_a_decoder_are_trained_on_and_scored(data, lengths):
    """A row is never longer than `length`, and there is room to write."""
    data = dataclasses.replace(data, **lengths)
    model = Model(KIND.fit(MODELS["decoder"], TOKENIZER, data))
    long = {"from": "a" * 50, "to": "b" * 50}
    encoded = KIND.encoder(model.cfg, TOKENIZER, data)(long)
    assert len(encoded["tokens"]) == len(encoded["targets"]) <= data.length
    trained = Trained(model, None, {"model": model.init(jax.random.key(0))}, TOKENIZER, meshes.make())
    assert len(KIND.write(trained, [long], data, 1)) == 1


def test_a_shorter_length_is_refused_when_scored(data):
    model = Model(MODELS["decoder"])
    trained = Trained(model, None, None, TOKENIZER, meshes.make())
    with pytest.raises(UserError, match="source_length: 8 leaves no room"):
        KIND.score(trained, dataclasses.replace(data, length=6, source_length=8), Evaluation(), "test")
