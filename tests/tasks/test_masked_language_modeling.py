"""Masked language modelling: what is hidden, that evaluation repeats itself, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.tasks import masked_language_modeling as mlm
from fastlm.tasks.task import Task
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step

CFG = ModelConfig(
    family="encoder", head="masked_language_model", vocab_size=33, max_length=16, layers=1, width=32, heads=4
)
MASK = 32
SPECIAL = jnp.arange(32) < 2


@pytest.fixture(scope="module")
def task() -> Task:
    return mlm.make(Model(CFG), MASK, SPECIAL, 0.25)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 32, (4, 16), dtype=np.int32)
    tokens[:, 0] = 1
    segments = np.ones((4, 16), np.int32)
    segments[1, 10:] = 0
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}


def test_hidden_places_are_real_words_and_know_what_stood_there(task):
    before = batch()
    hidden = 0
    for seed in range(50):
        after = task.prepare({}, task.constants, before, jnp.zeros((), jnp.int32), jax.random.key(seed))
        assert after["places"].shape == (4, 4)
        rows = np.arange(4)[:, None]
        mask = np.asarray(after["loss_mask"]) > 0
        assert mask.sum(axis=1).tolist() == [4, 3, 4, 4]  # a quarter of 15 and of 9 words, rounded up
        places = np.asarray(after["places"])
        assert all(len(set(row)) == 4 for row in places.tolist())
        np.testing.assert_array_equal(np.asarray(before["tokens"])[rows, places], after["targets"])
        assert (np.asarray(after["targets"])[mask] >= 2).all()  # special tokens are never asked
        assert (places[1][mask[1]] < 10).all()  # nor padding
        untouched = np.ones((4, 16), bool)
        untouched[np.nonzero(mask)[0], places[mask]] = False
        np.testing.assert_array_equal(np.asarray(after["tokens"])[untouched], np.asarray(before["tokens"])[untouched])
        hidden += (np.asarray(after["tokens"])[rows, places] == MASK)[mask].sum()
    assert 0.7 < hidden / (50 * 15) < 0.9


def test_evaluation_asks_the_same_of_a_row_wherever_it_stands(task):
    ask = lambda b: task.prepare({}, task.constants, b, jnp.zeros((), jnp.int32), None)
    before = batch()
    swapped = jax.tree.map(lambda x: x[::-1], before)
    one, two = ask(before), ask(swapped)
    np.testing.assert_array_equal(one["places"], two["places"][::-1])
    np.testing.assert_array_equal(one["tokens"], two["tokens"][::-1])
    assert not np.array_equal(one["places"][0], one["places"][2])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 16), st.floats(0.05, 0.95))
def test_as_many_places_as_the_share_of_what_may_be_asked(count, share):
    places, mask = mlm.choose(jax.random.key(0), jnp.arange(16) < count, share)
    assert int(mask.sum()) == min(int(np.ceil(np.float32(share) * np.float32(count))), len(places))
    assert all(int(place) < count for place, asked in zip(places, mask) if asked)


def test_it_learns_and_predict_agrees_with_the_evaluation_step(task):
    optimizer = optax.adam(3e-3)
    make_state = lambda: state.create(
        task, Model(CFG), optimizer, seed=0, rows=4, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    step, current, data = jax.jit(make_train_step(task, optimizer)), make_state(), batch()
    losses = []
    for _ in range(150):
        current, metrics = step(current, task.constants, data)
        losses.append(float(metrics["sums/nll"] / metrics["sums/tokens"]))
    assert losses[0] == pytest.approx(np.log(33), abs=0.3)
    assert np.mean(losses[-20:]) < 0.7 * losses[0]
    _, sums = jax.jit(make_eval_step(task))(current.params, (), task.constants, (), data, current.step)
    _, scores = jax.jit(task.predict)(current.params, task.constants, (), data)
    for name in ("nll", "correct", "tokens"):
        assert scores[name].shape == (4, 16)
        np.testing.assert_allclose(jnp.sum(scores[name]), sums[name], rtol=1e-5)
    metrics = task.summarize({name: float(value) for name, value in sums.items()})
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))


def test_a_tokenizer_without_a_mask_token_gets_one_behind_its_vocabulary():
    tokenizer = byte_level.ByteTokenizer()
    kind = mlm.MaskedLanguageModeling()
    cfg = ModelConfig(family="encoder", head="none", vocab_size=tokenizer.vocab_size, layers=1, width=16, heads=2)
    fitted = kind.fit(cfg, tokenizer, None)
    assert (fitted.vocab_size, fitted.head) == (tokenizer.vocab_size + 1, "masked_language_model")
    with pytest.raises(UserError, match="'decoder' cannot do this task; one of: encoder"):
        kind.fit(ModelConfig(vocab_size=300), tokenizer, None)
    with pytest.raises(UserError, match="mask_share: must lie between 0 and 1"):
        mlm.MaskedLanguageModeling(mask_share=1.5)
