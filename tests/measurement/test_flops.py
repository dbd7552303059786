import dataclasses

import jax
import pytest

from fastlm.measurement import flops
from fastlm.models import Model, ModelConfig
from fastlm.models.attention import KINDS
from fastlm.models.config import FEED_FORWARDS
from fastlm.ops import paths

TINY = {
    "vocab_size": 40, "layers": 2, "width": 16, "kv_heads": 2, "bias": True, "max_length": 8, "positions": "learned",
}  # fmt: skip


def entries_in(cfg):
    """Entries of all matrices that tokens are multiplied with, counted in the parameters."""
    shapes = paths.flatten(jax.eval_shape(Model(cfg).init, jax.random.key(0)))
    return sum(x.size for path, x in shapes.items() if len(x.shape) == 2 and not paths.matches("embedding", path))


def test_gpt2_small_by_hand():
    # 12 layers of 12 * 768^2 entries and a head of 768 * 50257; attention 4 * 512 * 768 a layer.
    by_hand = 2 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 4 * 512 * 768
    cfg = ModelConfig(vocab_size=50257, layers=12, width=768, heads=12, max_length=1024)
    assert flops.forward_flops(cfg, 1, 1024) == 1024 * by_hand
    assert flops.forward_flops(cfg, 3, 1024) == 3 * 1024 * by_hand


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_entries_are_those_of_the_parameters(kind, tied):
    cfg = ModelConfig(
        heads=(4, 2), head_dim=(4, 8), feed_forward=kind, feed_forward_width=(24, 40), tied_embeddings=tied, **TINY
    )
    counted = sum(flops.layer_entries(cfg.layer(i)) for i in range(2)) + flops.head_entries(cfg)
    assert counted == entries_in(cfg) + (40 * 16 if tied else 0)


@pytest.mark.parametrize(
    ("head", "rows"), [("masked_language_model", 5 * 8), ("sequence", 5), ("tokens", 5 * 8), ("none", 0)]
)
def test_an_encoder_sees_all_tokens_and_its_head_as_many_vectors_as_it_reads(head, rows):
    cfg = ModelConfig(family="encoder", heads=4, head=head, classes=3, pooler="tanh" * (head == "sequence"), **TINY)
    tied = 40 * 16 if head == "masked_language_model" else 0
    body = sum(flops.layer_entries(cfg.layer(i)) for i in range(2))
    ends = entries_in(cfg) + tied - body
    attention = 2 * 4 * 40 * 8 * 16  # layers * 4 * tokens * seen * width
    assert flops.forward_flops(cfg, 5, 8) == 2 * 40 * body + attention + 2 * rows * ends


def test_an_encoder_decoder_by_hand():
    cfg = ModelConfig(family="encoder_decoder", encoder_layers=1, heads=2, tied_embeddings=True, **TINY)
    width, rows, length, source = 16, 3, 4, 6
    encoder = rows * source * (2 * 12 * width**2 + 4 * source * width)
    own = rows * length * (2 * 12 * width**2 + 4 * length / 2 * width)
    cross = rows * (length * 2 * 2 * width**2 + source * 2 * 2 * width**2 + length * 4 * source * width)
    head = rows * length * 2 * width * 40
    assert flops.forward_flops(cfg, rows, length, source) == encoder + 2 * (own + cross) + head
    # A kind that looks at sums over the source instead of at its tokens.
    sums = dataclasses.replace(cfg, cross_attention="linear")
    fewer = 2 * rows * length * 4 * (source - 8) * width
    assert flops.forward_flops(sums, rows, length, source) == encoder + 2 * (own + cross) + head - fewer


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_is_counted_and_sparse_ones_by_what_they_see(name):
    family = {} if KINDS[name].causal else {"family": "encoder", "head": "none"}
    sizes = {"vocab_size": 40, "layers": 1, "width": 128, "heads": 2, "max_length": 1 << 16}
    full = ModelConfig(**sizes, **family)
    cfg = ModelConfig(attention=name, **sizes, **family)
    growth = lambda cfg: flops.forward_flops(cfg, 1, 1 << 16) / flops.forward_flops(cfg, 1, 1 << 12)
    assert flops.forward_flops(cfg, 1, 1 << 12) > 0
    quadratic = name in ("full", "latent", "transformer_xl")
    assert growth(full) > 80
    assert (growth(cfg) > 80) == quadratic
    if not quadratic:
        assert 15.9 < growth(cfg) < 40


def test_matrices_of_other_kinds_are_counted_too():
    width, rank = 64, 5
    cfg = ModelConfig(vocab_size=9, layers=1, width=width, heads=2, attention=f"gated_linear(rank={rank})")
    # q, k, v, out and the gate; the decays by way of `rank`.
    assert flops.attention_entries(cfg.layer(0)) == 5 * width**2 + 2 * rank * width
