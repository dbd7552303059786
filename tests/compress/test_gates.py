"""Gates on units: neutral while open, chances as drawn, the share that is wanted, an exact cut at the end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import gates
from fastlm.compress.gates import NAME, OPEN, Gated
from fastlm.compress.prune import Pruned
from fastlm.compress.setting import Setting
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, units
from fastlm.ops import paths
from fastlm.parallel import mesh as meshes
from fastlm.tasks import language_modeling
from fastlm.tasks.scoring import to_device
from fastlm.training import optimizers, precision, state
from fastlm.training.step import make_train_step

CFG = ModelConfig(vocab_size=32, max_length=16, layers=2, width=16, heads=4, kv_heads=2, feed_forward="swiglu")
MODEL = Model(CFG)
PLAIN = language_modeling.make(MODEL, np.ones(32, np.int32))
SETTING = Setting(MODEL, None, None, None, 16, 60, None)
TOKENS = jnp.arange(16).reshape(2, 8)


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 32, (4, 16), dtype=np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": np.ones((4, 16), np.float32)}


def with_gates(task, **values):
    """A task's trainables, with these gates."""
    params = task.init(jax.random.key(0), MODEL.init(jax.random.key(1)))
    for path, value in values.items():
        _, layer, name = path.split("_", 2)
        params[NAME]["layers"][layer][name] = jnp.asarray(value)
    return params


def test_open_gates_are_the_model_and_closed_ones_are_cut_out_exactly(no_mesh):
    task = Gated()(PLAIN, SETTING)
    params, nothing = with_gates(task), task.compression.init(with_gates(task))
    assert set(paths.flatten(params)) == set(task.axes)
    seen = task.compression.view(params, {}, nothing, 0, None)["model"]
    jax.tree.map(np.testing.assert_array_equal, seen, params["model"])
    with pytest.raises(UserError, match="--dead: something reads from every unit"):
        gates.alive(CFG, task.export(params, {}, nothing))
    closed = np.full(CFG.layer(1).feed_forward_width, OPEN)
    closed[5:] = -9.0
    params = with_gates(task, layers_1_feed_forward=closed, layers_0_attention=[-9.0, -9.0, OPEN, OPEN])
    exported = task.export(params, {}, nothing)
    part, scores = gates.alive(CFG, exported)
    small = part.config(CFG)
    assert (small.layer(1).feed_forward_width, small.layer(0).heads, small.layer(0).kv_heads) == (5, 2, 1)
    cut = part.take(CFG, exported, meshes.make(), scores)
    np.testing.assert_allclose(Model(small).apply(cut, TOKENS)[0], MODEL.apply(exported, TOKENS)[0], atol=1e-5)
    # One head of each group: neither group can go.
    spread = with_gates(task, layers_1_feed_forward=closed, layers_0_attention=[OPEN, -9.0, -9.0, OPEN])
    assert gates.alive(CFG, task.export(spread, {}, nothing))[0].config(CFG).layer(0).heads == 4
    assert not np.allclose(MODEL.apply(exported, TOKENS)[0], MODEL.apply(params["model"], TOKENS)[0], atol=1e-3)


def test_chances_are_those_of_what_is_drawn():
    logits = jnp.array([-3.0, -1.0, 0.0, 1.0, 3.0])
    found = jax.vmap(lambda key: gates.drawn(logits, key))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose((found > 0).mean(axis=0), gates.chance(logits), atol=0.03)
    assert float((found == 0).mean()) > 0.2 and float((found == 1).mean()) > 0.2
    assert gates.drawn(jnp.array([OPEN, -OPEN]), None).tolist() == [1.0, 0.0]


def test_numbers_of_units_are_those_of_smaller_models():
    sizes, task = gates.sizes_of(CFG), Gated()(PLAIN, SETTING)
    of = lambda unit: sum(
        leaf.size for path, leaf in paths.flatten(MODEL.init(jax.random.key(0))).items() if path.startswith(unit)
    )
    assert sizes[units.feed_forward(0)] * CFG.layer(0).feed_forward_width == of("layers/0/feed_forward/")
    assert sizes[units.heads(0)] == 2 * 16 * 4  # of q and out; keys are shared
    alone = ModelConfig(**{**vars(CFG), "kv_heads": 4})
    assert gates.sizes_of(alone)[units.heads(0)] == 4 * 16 * 4
    params = with_gates(task, layers_0_feed_forward=np.full(CFG.layer(0).feed_forward_width, -30.0))
    whole = sum(
        sizes[units.feed_forward(i)] * CFG.layer(i).feed_forward_width + sizes[units.heads(i)] * 4 for i in (0, 1)
    )
    _, metrics = task.compression.penalty(params, task.compression.init(params), jnp.int32(0))
    open_share = 1 - float(gates.chance(jnp.array(OPEN)))
    expected = of("layers/0/feed_forward/") / whole
    np.testing.assert_allclose(metrics["gone"], expected + (1 - expected) * open_share, atol=1e-4)


def training(model, task):
    """Returns how a state begins, and its optimizer."""
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), model.init(jax.random.key(0))))
    groups = ((NAME, {"rate": 30.0, "decay": 0.0}),)
    optimizer = optimizers.make(name="adamw", learning_rate=0.01, params=shapes, groups=groups)
    scale = precision.loss_scale_for("float32")
    create = lambda: state.create(task, model, optimizer, seed=0, rows=4, average=False, loss_scale=scale)
    return create, optimizer


def test_training_reaches_the_share_that_is_wanted():
    task = Gated(target="linear(start=0.0, end=0.5, until=0.5)", rate=2.0)(PLAIN, SETTING)
    create, optimizer = training(MODEL, task)
    now = create()
    step, wanted = jax.jit(make_train_step(task, optimizer)), []
    for number in range(60):
        now, metrics = step(now, task.constants, batch(number % 4))
        wanted.append(float(metrics["gone_wanted"]))
    assert wanted[0] == 0 and wanted[-1] == 0.5 and wanted == sorted(wanted)
    assert float(metrics["gone"]) == pytest.approx(0.5, abs=0.08)
    zeros = [
        float((np.asarray(gates.drawn(own, None)) == 0).mean()) for own in paths.flatten(now.params[NAME]).values()
    ]
    assert max(zeros) > 0.3
    # And the model that is exported has them.
    exported = task.export(now.params, {}, now.compression)
    assert gates.alive(CFG, exported)[0].config(CFG) != CFG


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"units": ("head",)}, "config.gated.units: no 'head'"),
        ({"units": ()}, "config.gated.units: empty"),
        ({"rate": 0.0}, "config.gated.rate: must be a positive number"),
        ({"target": 1.5}, "config.gated.target: must be at most 0.99"),
    ],
)
def test_what_is_wrong_is_said(wrong, message):
    with pytest.raises(UserError, match=message):
        Gated(**wrong)


def test_it_stacks_with_zeros():
    both = Gated()(Pruned(sparsity=0.5, method="masked")(PLAIN, SETTING), SETTING)
    params = with_gates(both)
    nothing = both.compression.init(params)
    seen = both.compression.view(params, {}, nothing, 0, None)["model"]
    assert float((np.asarray(seen["layers"]["0"]["feed_forward"]["down"]) == 0).mean()) == pytest.approx(0.5, abs=0.01)
    _, metrics = both.compression.penalty(params, nothing, jnp.int32(0))
    assert {"sparsity", "gone"} <= set(metrics)


@pytest.mark.slow
def test_gates_and_factors_on_a_mesh_are_those_of_one_device():
    cfg = ModelConfig(**{**vars(CFG), "formats": (("layers/1/.*/(up|q)", "low_rank(rank=4)"),)})
    model = Model(cfg)
    task = Gated()(language_modeling.make(model, np.ones(32, np.int32)), dataclasses.replace(SETTING, model=model))
    create, optimizer = training(model, task)
    step, alone = make_train_step(task, optimizer), jax.jit(create)()
    for number in range(3):
        alone, _ = jax.jit(step)(alone, task.constants, batch(number))
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    jax.set_mesh(mesh)
    placed = state.shardings(jax.eval_shape(create), task, mesh)
    current = jax.jit(create, out_shardings=placed)()
    cut = jax.jit(step, out_shardings=(placed, None))
    for number in range(3):
        current, _ = cut(current, task.constants, to_device(batch(number), mesh))
    up = current.params["model"]["layers"]["1"]["feed_forward"]["up"]
    assert not up.a.sharding.is_fully_replicated and not up.b.sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone.params, current.params)
