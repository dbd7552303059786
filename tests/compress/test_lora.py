"""LoRA: neutral at the start, trains what it should and nothing else, exports the sum, resumes exactly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress.lora import Lora
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.leaves import Adapted
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.tasks import language_modeling
from fastlm.training import build, loop, optimizers, precision, restore, state
from fastlm.training.step import make_train_step

CFG = ModelConfig(vocab_size=32, max_length=16, layers=2, width=32, heads=4, feed_forward="swiglu")
MODEL = Model(CFG)
LORA = Lora(rank=2, alpha=8.0, train=("final_norm",))


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 32, (4, 16), dtype=np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": np.ones((4, 16), np.float32)}


def test_a_leaf_is_its_dense_sum_under_every_verb():
    keys = jax.random.split(jax.random.key(0), 5)
    base, a, b = (jax.random.normal(k, s) for k, s in zip(keys, ((6, 5), (6, 2), (2, 5))))
    leaf = Adapted(base, a, b, 0.5)
    whole = np.asarray(base) + 0.5 * np.asarray(a) @ np.asarray(b)
    assert leaf.shape == (6, 5)
    np.testing.assert_allclose(dense(leaf), whole, rtol=1e-5, atol=1e-6)
    x, y = jax.random.normal(keys[3], (3, 6)), jax.random.normal(keys[4], (3, 5))
    np.testing.assert_allclose(contract(x, leaf), x @ whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(contract(y, leaf, transpose=True), y @ whole.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lookup(leaf, jnp.array([4, 0])), whole[[4, 0]], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    """(task, state before, state after some steps)"""
    plain = language_modeling.make(MODEL, np.ones(32, np.int32))
    task = LORA(plain)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), MODEL.init(jax.random.key(0))))
    groups = tuple((path, {"frozen": True}) for path in task.frozen)
    optimizer = optimizers.make(name="adamw", learning_rate=0.02, params=shapes, groups=groups, weight_decay=0.1)
    before = state.create(
        task, MODEL, optimizer, seed=0, rows=4, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    step, after, losses = jax.jit(make_train_step(task, optimizer)), before, []
    for _ in range(40):
        after, metrics = step(after, task.constants, batch())
        losses.append(float(metrics["sums/nll"] / metrics["sums/tokens"]))
    assert losses[-1] < losses[0] - 0.2
    return task, before, after


def test_it_starts_as_the_model_it_adapts(trained):
    task, before, _ = trained
    weights = task.compression.view(before.params, task.constants, (), 0, None)
    tokens = jnp.asarray(batch()["tokens"])
    np.testing.assert_array_equal(
        MODEL.apply(weights["model"], tokens)[0], MODEL.apply(before.params["model"], tokens)[0]
    )


def test_only_thin_matrices_and_what_is_named_learn_and_the_rest_has_no_state(trained):
    _, before, after = trained
    old, new = flatten(before.params), flatten(after.params)
    for path in old:
        same = np.array_equal(old[path], new[path])
        assert same == (path.startswith("model/") and "final_norm" not in path), path
    adapted = sum(leaf.size for path, leaf in new.items() if not path.startswith("model/") or "final_norm" in path)
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim)
    assert moments == 2 * adapted


def test_what_is_exported_computes_the_same(trained):
    task, _, after = trained
    exported = task.export(after.params, task.constants, ())
    assert jax.tree.structure(exported) == jax.tree.structure(after.params["model"])
    weights = task.compression.view(after.params, task.constants, (), 0, None)
    tokens = jnp.asarray(batch()["tokens"])
    expected = MODEL.apply(weights["model"], tokens)[0]
    np.testing.assert_allclose(MODEL.apply(exported, tokens)[0], expected, atol=2e-5)
    assert not np.allclose(MODEL.apply(after.params["model"], tokens)[0], expected, atol=1e-2)


def test_every_trainable_has_axes_and_gradients_of_frozen_weights_are_zero(trained):
    task, _, after = trained
    state.shardings(after, task, meshes.make())  # raises where axes are missing

    def loss(params):
        weights = task.compression.view(params, task.constants, (), 0, None)
        return task.loss(weights, task.constants, (), batch(), 0, None)[0]

    grads = flatten(jax.grad(loss)(after.params))
    assert all(
        bool(np.any(grad)) == (not path.startswith("model/") or "final_norm" in path) for path, grad in grads.items()
    )


def test_patterns_and_numbers_that_cannot_be():
    plain = language_modeling.make(MODEL, np.ones(32, np.int32))
    with pytest.raises(UserError, match=r"config\.lora\.paths: 'attention/qq' matches no parameter path"):
        dataclasses.replace(LORA, paths=("attention/qq",))(plain)
    with pytest.raises(UserError, match=r"config\.lora\.rank: must be at least 1"):
        Lora(rank=0)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_exactly_and_leaves_a_plain_model(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    tiny_config |= {"wrappers": ("lora",), "lora": {"rank": 2}}

    def run(name, stop_at=None):
        monkeypatch.setattr(loop.StopRequest, "now", lambda self, step: step == stop_at)
        return loop.run(build.build(tiny_config, tmp_path / name), say=lambda text: None)

    straight = run("straight")
    assert run("twice", stop_at=7).status == "interrupted"
    twice = run("twice")
    for path, leaf in flatten(straight.state.params).items():
        np.testing.assert_array_equal(leaf, flatten(twice.state.params)[path], err_msg=path)
    restored = restore.restore(tmp_path / "straight", meshes.make())
    tokens = jnp.arange(8)[None]
    np.testing.assert_allclose(
        restored.model.apply(restored.params, tokens)[0],
        restored.model.apply(straight.weights["model"], tokens)[0],
        atol=2e-5,
    )
    assert json.loads((tmp_path / "straight" / "config.json").read_text())["wrappers"] == ["lora"]
    tiny_config["lora"] = {"rank": 2, "alpha": 16.0}  # a key with its default, which older runs did not know
    assert run("straight").status == "finished"
    tiny_config["lora"] = {"rank": 3}
    with pytest.raises(UserError, match=r"holds a run with lora.rank=2, but the config says 3"):
        run("straight")
    tiny_config["wrappers"] = ("loro",)
    with pytest.raises(UserError, match=r"config\.wrappers: no 'loro'.*did you mean 'lora'"):
        run("other")
