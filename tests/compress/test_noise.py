"""Changed texts: where words may go and come from, which rows are no truth, and who has no use for it."""

import dataclasses

import jax
import numpy as np
import pytest

from fastlm.compress.noise import Noise, make
from fastlm.compress.on_policy import WRITTEN
from fastlm.errors import UserError
from tests.compress.students import SMALL, batch, setting, wrapped

ABOUT = setting(SMALL, "classification")


def test_words_give_way_to_words_of_the_batch_and_nothing_else():
    noisy, given = make(Noise(rows=0.5, words=1.0), ABOUT, "here"), batch("classification")
    there, special = set(given["tokens"].ravel().tolist()), ~noisy.words
    changed_rows = moved = 0
    for seed in range(8):
        found = noisy({}, given, 0, jax.random.key(seed))
        tokens, written = np.asarray(found["tokens"]), np.asarray(found[WRITTEN])
        differs = tokens != given["tokens"]
        assert not differs[written == 0].any() and set(tokens.ravel().tolist()) <= there
        assert not differs[np.arange(tokens.shape[1]) >= given["tokens_length"][:, None]].any()
        assert not differs[special[given["tokens"]]].any() and not special[tokens[differs]].any()
        changed_rows, moved = changed_rows + written.sum(), moved + differs.sum()
    assert 0 < changed_rows < 8 * len(written) and moved > 0
    kept = noisy({}, given, 0, None)
    np.testing.assert_array_equal(kept["tokens"], given["tokens"])
    assert not np.asarray(kept[WRITTEN]).any()


def test_labels_of_changed_rows_are_not_learned():
    """With every row changed, labels may be anything; the teacher's answer is learned all the same."""
    task = wrapped(ABOUT, terms=(("cross_entropy", 0.5), ("forward_kl", 0.5)), noise={"rows": 1.0, "words": 0.5})
    params = {"model": ABOUT.model.init(jax.random.key(2)), "distilled": {}}

    def gradient(given):
        ready = task.prepare(params, task.constants, given, 0, jax.random.key(1))
        return jax.grad(lambda p: task.loss(p, task.constants, task.carry(len(given["tokens"])), ready, 0, None)[0])(
            params
        )

    one = batch("classification")
    other = one | {"label": (one["label"] + 1) % 3}
    a, b = gradient(one), gradient(other)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(a)) > 0


def test_who_has_no_use_for_it():
    with pytest.raises(UserError, match=r"here\.rows: is for tasks that say something of whole texts"):
        make(Noise(rows=0.5), setting(SMALL), "here")
    with pytest.raises(UserError, match=r"config\.distilled\.noise: words: must be from 0 to 1, got 2"):
        wrapped(ABOUT, noise={"rows": 0.5, "words": 2.0})
    assert make(dataclasses.replace(Noise(), words=1.0), ABOUT, "here") is None
