import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.ops import paths
from fastlm.training import optimizers

SHAPES = {
    "model": {
        "embedding": {"table": (12, 8)},
        "layers": {
            "0": {"attention": {"q": (8, 8)}, "attention_norm": {"scale": (8,)}, "feed_forward": {"up": (8, 16)}},
            "1": {"attention": {"q": (8, 8)}, "attention_norm": {"scale": (8,)}, "feed_forward": {"up": (8, 16)}},
        },
        "head": {"kernel": (8, 12)},
    }
}
Q, SCALE, TABLE, HEAD = (
    "model/layers/0/attention/q",
    "model/layers/0/attention_norm/scale",
    "model/embedding/table",
    "model/head/kernel",
)


def tree(seed=0):
    """Random leaves, each of its own."""
    return paths.map_with_path(
        lambda path, shape: jax.random.normal(jax.random.key(seed + sum(map(ord, path))), shape),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADS = tree(0), tree(1000)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def step(grads=GRADS, steps=1, **options):
    """Updates after `steps` equal gradients, by path."""
    optimizer = optimizers.make(**{"name": "adamw", "learning_rate": 0.1, "params": PARAMS, **options})
    state = optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, PARAMS)
    return paths.flatten(updates)


def moved_by_decay(**options):
    """Paths that move although the gradient is zero, with p * (rate * decay) checked where they do."""
    flat, decay = paths.flatten(PARAMS), options.get("weight_decay", 0.1)
    moved = {path: update for path, update in step(ZEROS, **options).items() if np.any(update)}
    for path, update in moved.items():
        np.testing.assert_allclose(update, -0.1 * decay * flat[path], rtol=1e-5)
    return set(moved)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_decay_is_on_matrices_but_not_on_the_embedding(name):
    expected = {p for p in paths.flatten(PARAMS) if p.endswith(("attention/q", "feed_forward/up", "head/kernel"))}
    assert moved_by_decay(name=name) == expected


def test_decay_exclude_is_by_pattern():
    assert moved_by_decay(decay_exclude=("head", "layers/1", ".*/up")) == {Q, TABLE}
    assert moved_by_decay(weight_decay=0.0) == set()


def test_adamw_equals_optax():
    matrices = jax.tree.map(lambda p: p.ndim >= 2, PARAMS)
    oracle = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)
    )
    state = oracle.init(PARAMS)
    for _ in range(3):
        expected, state = oracle.update(GRADS, state, PARAMS)
    got = step(steps=3, decay_exclude=())
    for path, update in paths.flatten(expected).items():
        np.testing.assert_allclose(got[path], update, rtol=1e-5, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(clip=st.floats(0.01, 10.0))
def test_clip_bounds_the_norm_and_keeps_the_direction(clip):
    norm = float(optax.tree.norm(GRADS))
    updates = step(name="sgd", b1=0.0, weight_decay=0.0, clip=clip)
    factor = -0.1 * min(1.0, clip / norm)
    np.testing.assert_allclose(updates[Q], factor * GRADS["model"]["layers"]["0"]["attention"]["q"], rtol=1e-4)
    assert float(optax.tree.norm(updates)) <= 0.1 * clip * 1.0001
    unclipped = step(name="sgd", b1=0.0, weight_decay=0.0, clip=0.0)
    assert float(optax.tree.norm(unclipped)) == pytest.approx(0.1 * norm, rel=1e-5)


def test_frozen_leaves_stay_bit_identical_without_state_and_out_of_the_norm():
    optimizer = optimizers.make(
        name="adamw", learning_rate=0.1, params=PARAMS, groups=(("embedding|layers/0", {"frozen": True}),)
    )
    state = optimizer.init(PARAMS)
    huge = jax.tree.map(lambda g: g, GRADS)
    huge["model"]["embedding"]["table"] = jnp.full((12, 8), 1e6)
    params = PARAMS
    for _ in range(3):
        updates, state = optimizer.update(huge, state, params)
        params = optax.apply_updates(params, updates)
    before, after = paths.flatten(PARAMS), paths.flatten(params)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    assert still == {path for path in before if "embedding" in path or "layers/0/" in path}
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    trained = sum(leaf.size for path, leaf in before.items() if path not in still)
    assert sum(size for size in sizes if size > 1) == 2 * trained
    # A huge frozen gradient would have clipped the others to nothing; Adam hides it, momentum does not.
    frozen = step(huge, name="sgd", groups=(("embedding", {"frozen": True}),))
    assert np.abs(frozen[HEAD]).max() > 1e-3


def test_the_first_group_that_matches_counts():
    plain = step(ZEROS)
    everywhere = (".*", {"rate": 2.0, "decay": 0.2})
    groups = (("layers/0/attention/q", {"rate": 0.5}), ("layers/0", {"decay": 0.3}), everywhere)
    grouped = step(ZEROS, groups=groups)
    flat = paths.flatten(PARAMS)
    np.testing.assert_array_equal(grouped[Q], 0.5 * plain[Q])
    # A decay given by a group is decay, also for vectors and for excluded leaves.
    np.testing.assert_allclose(grouped[SCALE], -0.1 * 0.3 * flat[SCALE], rtol=1e-6)
    np.testing.assert_allclose(grouped[TABLE], -0.1 * 2.0 * 0.2 * flat[TABLE], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_rate_multiplier_is_exact(name):
    plain, quarter = step(name=name, steps=2), step(name=name, steps=2, groups=(("layers/1|head", {"rate": 0.25}),))
    for path, update in plain.items():
        factor = 0.25 if "layers/1" in path or "head" in path else 1.0
        np.testing.assert_array_equal(quarter[path], factor * update)


def test_ascent_turns_the_gradient_but_not_the_decay():
    gradient = step(weight_decay=0.0)[Q]
    decay = step(ZEROS)[Q]
    ascent = step(groups=(("layers/0", {"ascent": True}),))[Q]
    np.testing.assert_allclose(ascent, decay - gradient, rtol=1e-4, atol=1e-7)


def test_muon_is_orthogonal_on_hidden_matrices_and_adamw_elsewhere():
    updates = step(name="muon", weight_decay=0.0, steps=2, muon_adamw_rate=0.5)
    adamw = step(weight_decay=0.0, steps=2)
    for path, (inputs, outputs) in {Q: (8, 8), "model/layers/1/feed_forward/up": (8, 16)}.items():
        values = np.linalg.svd(updates[path], compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(inputs, outputs)))
        gradient = np.linalg.svd(paths.flatten(GRADS)[path], compute_uv=False)
        assert values.max() < 1.3
        assert values.max() / values.min() < min(3.0, gradient.max() / gradient.min())
    for path in (SCALE, TABLE, HEAD):
        np.testing.assert_array_equal(updates[path], 0.5 * adamw[path])


def test_shape_factor_of_muon():
    up = "model/layers/0/feed_forward/up"
    rms = step(name="muon", weight_decay=0.0)
    spectral = step(name="muon", weight_decay=0.0, muon_shape_factor="spectral")
    np.testing.assert_allclose(rms[up] / (0.2 * np.sqrt(16)), spectral[up] / np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_a_quadratic_converges_inside_jit(name):
    target = tree(5)
    # An update of Muon has a fifth of the size of Adam's.
    schedule = optax.linear_schedule(0.25 if name == "muon" else 0.05, 0.0, 250)
    optimizer = optimizers.make(
        name=name, learning_rate=schedule, params=PARAMS, weight_decay=0.0, groups=(("head", {"frozen": True}),)
    )
    distance = lambda params: optax.tree.norm(jax.tree.map(jnp.subtract, params, target))

    @jax.jit
    def train(params):
        def body(_, carry):
            params, state = carry
            grads = jax.tree.map(jnp.subtract, params, target)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 250, body, (params, optimizer.init(params)))[0]

    start = {**PARAMS["model"], "head": target["model"]["head"]}
    trained = train({"model": start})
    assert float(distance(trained)) < 0.1 * float(distance({"model": start}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_shapes_are_enough_and_state_mirrors_paths(name):
    abstract = jax.eval_shape(lambda: PARAMS)
    optimizer = optimizers.make(
        name=name, learning_rate=0.1, params=abstract, groups=(("embedding", {"frozen": True}),)
    )
    state = jax.eval_shape(optimizer.init, abstract)
    concrete = jax.jit(optimizer.init)(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(concrete)
    # Placement finds the parameter by the end of the path, so every moment has to end with one.
    flat = paths.flatten(PARAMS)
    moments = {path: leaf for path, leaf in paths.flatten(state).items() if leaf.shape}
    assert moments
    for path, leaf in moments.items():
        (owner,) = [p for p in flat if path.endswith("/" + p)]
        assert leaf.shape == flat[owner].shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"groups": (("layers/7/attention/q", {"rate": 0.1}),)}, r"groups\[0\].*nearest are .*layers/./attention/q"),
        ({"groups": (("head", {"rates": 0.1}),)}, "did you mean 'rate'"),
        ({"groups": (("head", {"rate": -1.0}),)}, r"groups\[0\]\.rate: -1\.0"),
        ({"groups": ((".*", {"frozen": True}),)}, "every parameter is frozen"),
        ({"decay_exclude": ("embeding",)}, "optimizer.decay_exclude: 'embeding'"),
        ({"name": "muon", "muon_paths": ("blocks",)}, "optimizer.muon_paths"),
        ({"muon_shape_factor": "rm"}, "did you mean 'rms'"),
        ({"muon_dtype": "float16"}, "muon_dtype: no 'float16'"),
        ({"b2": 1.0}, "optimizer.b2: 1.0 is not a number of at least 0 and below 1"),
        ({"clip": -1.0}, "optimizer.clip"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        step(**options)
    assert "\n" not in str(caught.value)
