"""Distances between what is inside two models, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np

from fastlm.compress.features import AttentionScores
from fastlm.tasks.task import Read


def read(seed, kv_heads, head_dim, documents):
    """What a model of one layer with 4 heads might capture."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(*documents.shape, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    qkv = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return Read(jnp.zeros(0), {}, (), {"qkv": [qkv]}, {"": documents})


def test_scores_of_attention_are_compared_where_a_key_is_visible():
    """Heads of other widths and groups; two documents in a row, and padding."""
    documents = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    student, teacher = read(0, 4, 3, documents), read(1, 2, 8, documents)
    for causal in (False, True):
        found = AttentionScores()({}, student, teacher, ((1, 1),), causal)
        sizes = []
        for row, of in enumerate(np.asarray(documents)):
            by_query = []
            for query in np.flatnonzero(of):
                seen = [key for key in np.flatnonzero(of == of[query]) if key <= query or not causal]
                errors = []
                for head in range(4):
                    for key in seen:
                        own, theirs = (
                            float(q[row, query, head] @ k[row, key, head // (4 // k.shape[2])]) / q.shape[3] ** 0.5
                            for q, k, _ in (student.captured["qkv"][0], teacher.captured["qkv"][0])
                        )
                        errors.append((own - theirs) ** 2)
                by_query.append(np.mean(errors))
            sizes.append(np.mean(by_query))
        np.testing.assert_allclose(found, sizes, rtol=1e-5)
