"""Masks in training: neutral without zeros, exact counts as the schedule says, what each method does with a zero."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import masks
from fastlm.compress.lora import Lora
from fastlm.compress.prune import Pruned
from fastlm.compress.setting import Setting
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.tasks import language_modeling
from fastlm.tasks.scoring import to_device
from fastlm.training import build, loop, optimizers, precision, restore, state
from fastlm.training.step import make_train_step

CFG = ModelConfig(vocab_size=32, max_length=16, layers=2, width=16, heads=2, feed_forward="swiglu")
MODEL = Model(CFG)
PLAIN = language_modeling.make(MODEL, np.ones(32, np.int32))
STEPS = 20
SETTING = Setting(MODEL, None, None, None, 16, STEPS, None)
SHARES = {"every": 4, "until": 0.5}


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 32, (4, 16), dtype=np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": np.ones((4, 16), np.float32)}


def trained(task, steps=STEPS, model_params=None, learning_rate=0.02):
    """Returns the states before and after each step, and the metrics of each."""
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), MODEL.init(jax.random.key(0))))
    optimizer = optimizers.make(name="adamw", learning_rate=learning_rate, params=shapes, weight_decay=0.1)
    now = state.create(
        task,
        MODEL,
        optimizer,
        seed=0,
        rows=4,
        average=False,
        loss_scale=precision.loss_scale_for("float32"),
        model_params=model_params,
    )
    step, states, metrics = jax.jit(make_train_step(task, optimizer)), [now], []
    for number in range(steps):
        now, found = step(now, task.constants, batch(number))
        states, metrics = [*states, now], [*metrics, found]
    return states, metrics


def ones(found):
    return flatten(found.compression["masks"])


def test_without_zeros_it_is_training_as_it_was():
    plain, _ = trained(PLAIN)
    for method in ("masked", "straight_through"):
        pruned, metrics = trained(Pruned(method=method, sparsity=0.0, **SHARES)(PLAIN, SETTING))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain[-1].params, pruned[-1].params)
        assert float(metrics[-1]["sparsity"]) == 0.0


@pytest.mark.parametrize("method", ["masked", "straight_through"])
def test_counts_are_those_of_the_schedule_and_renewed_when_due(method):
    schedule = "cubic(start=0.0, end=0.5, until=0.5)"
    pruned = Pruned(method=method, sparsity=schedule, **SHARES)
    states, _ = trained(pruned(PLAIN, SETTING))
    wanted, value = pruned._sparsity(STEPS), 0.0
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        if number % 4 == 0 and number <= 10:
            value = float(wanted(number))
        for path, mask in ones(after).items():
            assert int(mask.sum()) == mask.size - round(value * mask.size), (number, path)
            if number % 4 or number > 10:
                np.testing.assert_array_equal(mask, ones(before)[path])
    assert value > 0.4
    exported = flatten(pruned(PLAIN, SETTING).export(states[-1].params, PLAIN.constants, states[-1].compression))
    for path, mask in ones(states[-1]).items():
        np.testing.assert_array_equal(np.asarray(exported[path.removeprefix("model/")]) == 0, ~np.asarray(mask))
        assert float(jnp.abs(flatten(states[-1].params)[path][~mask]).max()) > 0  # they keep their value


def test_what_is_left_out_learns_straight_through_and_only_there():
    start = MODEL.init(jax.random.key(3))
    moved = {}
    for method in ("masked", "straight_through"):
        task = Pruned(method=method, sparsity=0.5, every=100)(PLAIN, SETTING)
        view = lambda params, task=task: task.compression.view(params, {}, task.compression.init(params), 0, None)

        def loss(params, view=view):
            return PLAIN.loss(view(params), PLAIN.constants, (), batch(), 0, None)[0]

        params = {"model": start}
        grads, mask = flatten(jax.grad(loss)(params)), flatten(task.compression.init(params)["masks"])
        moved[method] = max(float(jnp.abs(grads[path][~mask[path]]).max()) for path in mask)
    assert moved["masked"] == 0.0 and moved["straight_through"] > 0


def test_regrown_masks_change_places_and_not_their_number():
    task = Pruned(method="regrown", sparsity=0.6, allocation="erdos_renyi", **SHARES)(PLAIN, SETTING)
    states, metrics = trained(task)
    first, last, moved = ones(states[0]), ones(states[-1]), 0
    for path, mask in first.items():
        assert int(mask.sum()) == int(last[path].sum())
        moved += int((mask != last[path]).sum())
        assert float(jnp.abs(flatten(states[-1].params)[path][~last[path]]).max()) == 0.0
    assert moved > 0 and float(metrics[0]["sparsity"]) == pytest.approx(0.6, abs=0.01)


def test_zeros_of_the_start_stay_zero():
    start = MODEL.init(jax.random.key(5))
    start["layers"]["0"]["feed_forward"]["up"] = start["layers"]["0"]["feed_forward"]["up"].at[::2].set(0.0)
    states, _ = trained(Pruned(method="kept", **SHARES)(PLAIN, SETTING), 5, start)
    after = flatten(Pruned(method="kept")(PLAIN, SETTING).export(states[-1].params, {}, states[-1].compression))
    up = np.asarray(after["layers/0/feed_forward/up"])
    assert (up[::2] == 0).all() and (up[1::2] != 0).mean() > 0.99
    assert not np.allclose(up[1::2], start["layers"]["0"]["feed_forward"]["up"][1::2])


def test_movement_is_summed_and_gradients_decide():
    task = Pruned(score="movement", sparsity=0.5, method="straight_through", every=1, until=1.0)(PLAIN, SETTING)
    states, _ = trained(task, 6)
    path = "model/layers/0/feed_forward/up"
    sums = flatten(states[-1].compression["sums"])[path]
    np.testing.assert_array_equal(ones(states[-1])[path], masks.by_matrix({path: sums}, 0.5)[path])
    assert (np.asarray(sums) > 0).any() and (np.asarray(sums) < 0).any()


def test_n_of_m_in_training():
    states, metrics = trained(Pruned(allocation="2:4", **SHARES)(PLAIN, SETTING), 2)
    for mask in ones(states[-1]).values():
        assert (np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2).all()
    assert float(metrics[-1]["sparsity"]) == 0.5


def test_it_prunes_below_thin_matrices_and_not_above_them():
    lora, pruned = Lora(rank=2), Pruned(sparsity=0.5)
    task = lora(pruned(PLAIN, SETTING), SETTING)
    states, _ = trained(task, 2)
    assert flatten(task.export(states[-1].params, {}, states[-1].compression))
    with pytest.raises(UserError, match="'pruned' comes before what gives weights another form"):
        trained(pruned(lora(PLAIN, SETTING), SETTING), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "maskd"}, "no 'maskd'; did you mean 'masked'"),
        ({"score": "wanda"}, "looks at more than the gradient"),
        ({"sparsity": 1.5}, "config.pruned.sparsity: must be at most 1, got 1.5"),
        ({"sparsity": math.nan}, "config.pruned.sparsity: must be at least 0 and finite"),
        ({"allocation": "3:2"}, "keeps 3 of each 2"),
        ({"every": 0}, "config.pruned.every: must be at least 1"),
        ({"until": 2.0}, "config.pruned.until: must be from 0 to 1"),
        ({"paths": ("feed_forward/upp",)}, "'feed_forward/upp' matches no parameter path"),
    ],
)
def test_what_cannot_be_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        Pruned(**changes)(PLAIN, SETTING)


@pytest.mark.parametrize("method", ["masked", pytest.param("regrown", marks=pytest.mark.slow)])
def test_resumed_in_mid_schedule_it_is_the_same_bit_for_bit(tiny_config, tmp_path, monkeypatch, method):
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    tiny_config["wrappers"] = ("pruned",)
    tiny_config["pruned"] = {"method": method, "every": 2, "sparsity": "linear(start=0.2, end=0.6, until=0.8)"}

    def run(name, stop_at=None):
        monkeypatch.setattr(loop.StopRequest, "now", lambda self, step: step == stop_at)
        return loop.run(build.build(tiny_config, tmp_path / name), say=lambda text: None)

    straight = run("straight")
    assert run("twice", stop_at=7).status == "interrupted"
    twice = run("twice")
    jax.tree.map(np.testing.assert_array_equal, straight.state.params, twice.state.params)
    jax.tree.map(np.testing.assert_array_equal, straight.state.compression, twice.state.compression)
    stored = flatten(restore.restore(tmp_path / "straight", meshes.make()).params)
    for path, mask in flatten(straight.state.compression["masks"]).items():
        np.testing.assert_array_equal(np.asarray(stored[path.removeprefix("model/")]) != 0, mask)


@pytest.mark.slow
def test_sharded_equals_unsharded():
    task = Pruned(sparsity="linear(start=0.2, end=0.6)", every=1, until=1.0, allocation="global")(PLAIN, SETTING)
    alone, _ = trained(task, 3)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    jax.set_mesh(mesh)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), MODEL.init(jax.random.key(0))))
    optimizer = optimizers.make(name="adamw", learning_rate=0.02, params=shapes, weight_decay=0.1)
    scale = precision.loss_scale_for("float32")
    create = lambda: state.create(task, MODEL, optimizer, seed=0, rows=4, average=False, loss_scale=scale)
    placed = state.shardings(jax.eval_shape(create), task, mesh)
    current = jax.jit(create, out_shardings=placed)()
    step = jax.jit(make_train_step(task, optimizer), out_shardings=(placed, None))
    for number in range(3):
        current, _ = step(current, task.constants, to_device(batch(number), mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(current.compression["masks"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone[-1].params, current.params)
    jax.tree.map(np.testing.assert_array_equal, alone[-1].compression["masks"], current.compression["masks"])
