"""Starting from a trained model: what is taken over, what is new, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, attention, huggingface
from fastlm.ops.paths import flatten, map_with_path
from fastlm.training import build, initial, loop
from tests.models.huggingface_folders import GOLDEN

CFG = ModelConfig(vocab_size=20, max_length=16, layers=1, width=16, heads=2, positions="learned")
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def trained():
    return jax.jit(Model(CFG).init)(jax.random.key(0))


def taken(trained, **changes):
    return initial.taken_over(trained, dataclasses.replace(CFG, **changes), KEY, where="here")


def test_everything_that_fits_is_taken_over(trained):
    for path, leaf in flatten(taken(trained, dropout=0.1)).items():
        np.testing.assert_array_equal(leaf, flatten(trained)[path])


def test_a_new_head_and_new_words_are_made_anew_and_the_rest_stays(trained):
    got = flatten(taken(trained, vocab_size=23, head="sequence", classes=3))
    assert {path: leaf.shape for path, leaf in got.items() if path.startswith("head")} == {
        "head/kernel": (16, 3),
        "head/bias": (3,),
    }
    table = got.pop("embedding/table")
    np.testing.assert_array_equal(table[:20], trained["embedding"]["table"])
    assert float(jnp.abs(table[20:]).max()) > 0
    for path, leaf in flatten(trained).items():
        if path in got:
            np.testing.assert_array_equal(leaf, got[path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, r"here does not have layers/1/attention/k \(16, 16\), .* and \d+ more; change config.model"),
        ({"max_length": 8}, r"does not have embedding/positions \(8, 16\) \(its own is \(16, 16\)\)"),
        ({"positions": "rotary"}, r"also has embedding/positions"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(trained, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        taken(trained, **changes)
    assert "\n" not in str(caught.value)


def test_converted_attention_keeps_what_fits_and_no_other_part_may_be_new():
    """A gate and decays are new in the layer that is converted; nothing is in one that is not, or beside attention."""
    source = dataclasses.replace(CFG, layers=2, qk_norm=True)
    cfg = dataclasses.replace(source, attention=("full", "gated_linear(rank=3)"))
    weights = jax.jit(Model(source).init)(jax.random.key(0))
    converted = attention.converted(source, cfg)
    got = flatten(initial.taken_over(weights, cfg, KEY, where="here", converted=converted))
    assert {path: leaf.shape for path, leaf in got.items()} == {
        path: leaf.shape for path, leaf in flatten(abstract(cfg)[0]).items()
    }
    new = set(got) - set(flatten(weights))
    names = ("gate", "decay_in", "decay_out", "decay_bias", "out_norm/scale")
    assert new == {f"layers/1/attention/{name}" for name in names}
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)
    with pytest.raises(UserError, match="here does not have layers/1/attention/decay_bias"):
        initial.taken_over(weights, cfg, KEY, where="here")
    wider = dataclasses.replace(cfg, feed_forward_width=32)
    with pytest.raises(UserError, match="here does not have layers/0/feed_forward/down"):
        initial.taken_over(weights, wider, KEY, where="here", converted=converted)
    back = flatten(initial.taken_over(got_tree(got, cfg), source, KEY, where="here", converted=converted))
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def got_tree(leaves, cfg):
    return map_with_path(lambda path, _: leaves[path], abstract(cfg)[0])


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("full", "full", ()),
        ("local(window=64, block=0)", "local(window=64)", ()),
        ("local(window=64)", "local(window=32)", ("layers/0/attention", "layers/1/attention")),
        (("full", "linear"), ("full", "full"), ("layers/1/attention",)),
        ("full", ("full", "linear"), ("layers/1/attention",)),
    ],
)
def test_attention_is_converted_where_kind_or_options_differ(old, new, where):
    one, other = (dataclasses.replace(CFG, layers=2, attention=spec) for spec in (old, new))
    assert attention.converted(one, other) == where


def test_a_decoders_look_at_the_source_is_converted_too():
    cfg = dataclasses.replace(CFG, family="encoder_decoder", encoder_layers=1)
    linear = dataclasses.replace(cfg, cross_attention="linear")
    assert attention.converted(cfg, linear) == ("layers/1/cross_attention",)
    assert attention.converted(cfg, dataclasses.replace(cfg, attention=("local", "full"))) == ("layers/0/attention",)


def test_what_conversion_makes_anew_and_leaves_behind_is_said(tmp_path):
    cfg = dataclasses.replace(CFG, layers=3, attention=("full", "full", "gated_linear"))
    start = start_with(cfg, tmp_path)
    changed = dataclasses.replace(cfg, attention=("gated_linear", "local", "full"))
    first, new, kept, left = initial.notes(start, changed)
    assert "changed: attention ('gated_linear', 'local', 'full') (there ('full', 'full', 'gated_linear'));" in first
    gates = "decay_bias, decay_in, decay_out, gate, out_norm/scale"
    assert new == f"layers/0/attention: made anew {gates}; left behind nothing"
    assert kept == "layers/1/attention: made anew nothing; left behind nothing"
    assert left == f"layers/2/attention: made anew nothing; left behind {gates}"


def test_every_key_of_the_section_changes_an_architecture():
    source = dataclasses.replace(CFG, dropout=0.1, width=32)
    assert initial.changed(source, {"dropout": 0.0}) == dataclasses.replace(CFG, width=32)  # 0 is the default
    with pytest.raises(UserError, match="config.model.dropuot: no such key; did you mean 'dropout'"):
        initial.changed(CFG, {"dropuot": 0.2})


def test_what_came_of_it_is_said_before_training():
    imported = huggingface.read(GOLDEN / "bert_model").cfg
    source = dataclasses.replace(imported, pooling="mean", dropout=0.1)
    init, origin = initial.Init(), {"architecture": "BertModel"}
    start = initial.Start(init, 7, source, None, origin)
    classifier = dataclasses.replace(source, head="sequence", classes=3, dropout=0.0)
    first, second = initial.notes(start, classifier)
    assert "step 7; changed: head 'sequence' (there 'none'), classes 3 (there 0), dropout 0.0 (there 0.1);" in first
    assert "pooling 'mean'" in first.partition("as there: ")[2]
    assert "cannot be written for Hugging Face" in second
    assert "BertForSequenceClassification): pooling 'mean' (there 'first')" in second
    (only,) = initial.notes(start, dataclasses.replace(classifier, pooling="first"))
    assert "pooling 'first' (there 'mean')" in only
    assert len(initial.notes(dataclasses.replace(start, origin={}), classifier)) == 1


def test_a_run_goes_on_from_another(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    tiny_config["training"]["steps"] = 4
    first = loop.run(build.build(tiny_config, tmp_path / "first"), say=lambda text: None)
    about = tmp_path / "first" / "checkpoints" / "4" / "about" / "metadata"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"huggingface": {"chat_template": "a"}}))
    second = {**tiny_config, "init": {"source": str(tmp_path / "first"), "step": ""}, "model": {"dropout": 0.1}}
    second["tokenizer"] = {"kind": "bpe", "path": "", "vocab_size": 4096}  # not used: the model brings its own
    experiment = build.build(second, tmp_path / "second")
    assert experiment.tokenizer.to_json() == build.build(tiny_config, tmp_path / "first").tokenizer.to_json()
    assert (experiment.model.cfg.dropout, experiment.model.cfg.layers) == (0.1, 1)
    assert any("changed: dropout 0.1 (there 0.0);" in note for note in experiment.notes)
    assert loop.describe(experiment)["huggingface"] == {"chat_template": "a"}, "what it came with stays with it"
    run = loop.Run(experiment)
    for path, leaf in flatten(run.state.params).items():
        np.testing.assert_array_equal(leaf, flatten(first.state.params)[path])
    run.batches.close()
    run.checkpoints.close()


def test_a_source_that_is_no_workdir_names_the_converter(tmp_path):
    with pytest.raises(UserError, match=r"holds no fastlm checkpoint.*python -m fastlm\.convert --from"):
        initial.Init(source=str(tmp_path))


# --- a part of a trained model -----------------------------------------------------------------------

TRANSLATOR = dataclasses.replace(CFG, layers=3, family="encoder_decoder", encoder_layers=4)


def start_with(cfg, tmp_path, **part):
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    return initial.Start(initial.Init(source=str(tmp_path), **part), 7, cfg, None, {})


@pytest.mark.parametrize(
    ("cfg", "layers", "section", "numbers"),
    [
        (dataclasses.replace(CFG, layers=6), "0,2,5", {}, (0, 2, 5)),
        (dataclasses.replace(CFG, layers=6), "evenly", {"layers": 3}, (0, 3, 5)),
        (TRANSLATOR, "0,2|1, 2", {}, (0, 2, 5, 6)),
        (TRANSLATOR, "|0", {"layers": 1}, (0, 1, 2, 3, 4)),
        (TRANSLATOR, "evenly", {"layers": 2}, (0, 1, 2, 3, 4, 6)),
        (TRANSLATOR, "evenly", {"layers": 1, "encoder_layers": 2}, (0, 3, 4)),
    ],
)
def test_layers_are_named_in_words(tmp_path, cfg, layers, section, numbers):
    start = start_with(cfg, tmp_path, layers=layers)
    small = start.architecture(section)
    assert small.total_layers == len(numbers)
    assert start.part(small.layers, small.encoder_layers).layers == numbers
    (note,) = initial.notes(start, small)
    assert f"starts from layers {', '.join(map(str, numbers))} of {cfg.total_layers} of {tmp_path}, step 7; " in note
    assert f"(there {cfg.layers})" in note or small.layers == cfg.layers


@pytest.mark.parametrize(
    ("part", "section", "message"),
    [
        (
            {"layers": "0,7"},
            {},
            "config.init.layers: '0,7': give 'evenly', or ascending numbers from 0 to 3, each once",
        ),
        ({"layers": "2,1"}, {}, "config.init.layers: '2,1': give"),
        ({"layers": "odd"}, {}, "config.init.layers: 'odd': give"),
        ({"layers": "0|1"}, {}, "does not fit a model of family 'decoder'; write '0,2,4'"),
        ({"layers": "evenly"}, {}, "'evenly' leaves open how many; say so with config.model.layers"),
        ({"layers": "evenly"}, {"layers": 5}, "config.init: 5 of 4 layers cannot be kept"),
        ({"layers": "0,1"}, {"layers": 3}, "config.model.layers: says 3, but what config.init.layers keeps has 2"),
        ({"width": 17}, {}, "config.init.width: 17 cannot be kept of 16; give 1 to 16, or 0 for all"),
        ({"feed_forward_width": -1}, {}, "config.init.feed_forward_width: -1 cannot be kept of 64"),
        ({"heads": 3}, {}, "config.init.heads: 3 of 4 heads are neither whole groups of 2 that share a key, nor"),
        ({"heads": 2}, {"kv_heads": 2}, "config.model.kv_heads: says 2, but what config.init.heads keeps has 1"),
        ({"width": 8}, {"width": 16}, "config.model.width: says 16, but what config.init.width keeps has 8"),
    ],
)
def test_parts_that_cannot_be(tmp_path, part, section, message):
    cfg = dataclasses.replace(CFG, layers=4, heads=4, kv_heads=2)
    with pytest.raises(UserError, match=message) as caught:
        start_with(cfg, tmp_path, **part).architecture(section)
    assert "\n" not in str(caught.value)


def test_a_part_needs_a_whole():
    with pytest.raises(UserError, match=r"config\.init\.width: keeps a part of a trained model; name it with config"):
        initial.Init(width=8)


def begun_run(config, workdir, say=print):
    """A run before its first step, saved."""
    run = loop.Run(build.build(config, workdir), say=say)
    run.save()
    run.batches.close()
    run.checkpoints.close()
    if run.lock is not None:
        run.lock.close()
    return run


def test_a_run_begins_with_a_part_of_a_model_and_goes_on(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    tiny_config["evaluation"] |= {"split": "", "every": 0, "final_split": ""}
    tiny_config["model"] |= {"layers": 3, "heads": 4}
    teacher = begun_run(tiny_config, tmp_path / "teacher").state.params["model"]
    part = {"layers": "evenly", "width": 12, "feed_forward_width": 24, "heads": 2}
    tiny_config["init"] = {"source": str(tmp_path / "teacher"), "step": "", **part}
    tiny_config["model"] = {"layers": 2}
    run = begun_run(tiny_config, tmp_path / "student")
    cfg = run.experiment.model.cfg
    assert (cfg.layers, cfg.width, cfg.layer(0).heads, cfg.layer(0).head_dim) == (2, 12, 2, 4)
    assert "layers 0, 2 of 3, the 12 largest hidden units, the 24 largest feed-forward units" in run.experiment.notes[0]
    begun = jax.device_get(flatten(run.state.params["model"]))
    table, up = np.asarray(teacher["embedding"]["table"]), np.asarray(teacher["layers"]["2"]["feed_forward"]["up"])
    hidden = [np.flatnonzero((table == column[:, None]).all(axis=0)).item() for column in begun["embedding/table"].T]
    assert hidden == sorted(set(hidden)) and len(hidden) == 12
    for column in begun["layers/1/feed_forward/up"].T:
        assert (up[hidden] == column[:, None]).all(axis=0).sum() == 1
    said = []
    again = begun_run(tiny_config, tmp_path / "student", said.append)
    assert said == [f"resuming {tmp_path / 'student'} at step 0"]
    jax.tree.map(np.testing.assert_array_equal, again.state.params, run.state.params)
