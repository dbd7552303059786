"""Random weights of any model, without compiling anything."""

import numpy as np

from fastlm.models import abstract
from fastlm.ops.paths import map_with_path


def drawn(cfg, scale=0.4):
    """Biases and gains too, for zeros and ones would hide where they went."""
    draw = np.random.default_rng(1)
    noise = lambda leaf: np.float32(scale * draw.standard_normal(leaf.shape))
    return map_with_path(lambda path, leaf: noise(leaf) + path.endswith("scale"), abstract(cfg)[0])
