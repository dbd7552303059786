"""Models with random weights that writers are tested on: two decoders and the three styles of encoder-decoders."""

import dataclasses
import functools

import numpy as np

from fastlm.models import Model, ModelConfig, abstract
from fastlm.ops.paths import map_with_path

END = 2

TINY = ModelConfig(vocab_size=4, max_length=48, layers=1, width=16, heads=2, head_bias=True, positions="alibi")
DECODER = dataclasses.replace(TINY, vocab_size=11, layers=2, kv_heads=1, positions="rotary")
MARIAN = dataclasses.replace(
    TINY,
    vocab_size=11,
    family="encoder_decoder",
    encoder_layers=1,
    norm_place="post",
    positions="sinusoidal",
    feed_forward="silu",
    bias=True,
)
BART = dataclasses.replace(MARIAN, positions="learned", position_offset=2, embedding_norm=True)
T5 = dataclasses.replace(
    MARIAN,
    norm="rms_norm",
    norm_place="pre",
    positions="relative",
    relative_buckets=8,
    relative_distance=16,
    attention_scale=1.0,
    feed_forward="relu",
    bias=False,
    tied_embeddings=False,
)
CONFIGS = {"tiny": TINY, "decoder": DECODER, "marian": MARIAN, "bart": BART, "t5": T5}


def random_params(cfg, seed):
    """Weights of which none has a special value, drawn without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path.endswith("norm/scale") else 0.0
        return (centre + 0.5 * rng.normal(size=leaf.shape)).astype(np.float32)

    return map_with_path(draw, abstract(cfg)[0])


# By name: a seed, and what is added to the end token's bias so that texts end early but not all at once.
DRAWN = {"tiny": (4, 2.0), "decoder": (3, 3.0), "marian": (5, 1.0), "bart": (3, 1.0), "t5": (3, 4.0)}


@functools.cache
def build(name, likes_end=None):
    """Returns (model, params)."""
    seed, usual = DRAWN[name]
    params = random_params(CONFIGS[name], seed)
    params["head"]["bias"][END] += usual if likes_end is None else likes_end
    return Model(CONFIGS[name]), params
