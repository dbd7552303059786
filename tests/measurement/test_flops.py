import pytest

from fastlm.measurement import flops
from fastlm.models.config import ModelConfig


def test_gpt2_small_by_hand():
    # 12 layers of 12 * 768^2 entries and a head of 768 * 50257; attention 4 * 512 * 768 a layer.
    by_hand = 2 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 4 * 512 * 768
    assert flops.forward_flops_per_token(12 * 12 * 768**2 + 768 * 50257, [(12, 64)] * 12, 1024) == by_hand
    cfg = ModelConfig(vocab_size=50257, layers=12, width=768, heads=12, max_length=1024)
    assert flops.model_flops_per_token(cfg, 1024) == by_hand


def test_causal_halves_attention_only():
    full = flops.forward_flops_per_token(1000, [(2, 8), (4, 8)], 64, causal=False)
    causal = flops.forward_flops_per_token(1000, [(2, 8), (4, 8)], 64)
    assert full - 2000 == 4 * 64 * 48 == 2 * (causal - 2000)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(flops.FEED_FORWARD_MATRICES))
def test_matrix_parameters_are_those_of_the_model(kind, tied):
    import jax

    from fastlm.models import Model
    from fastlm.ops import paths

    cfg = ModelConfig(
        vocab_size=40, layers=2, width=16, heads=(4, 2), kv_heads=2, head_dim=(4, 8), feed_forward=kind,
        feed_forward_width=(24, 40), tied_embeddings=tied, bias=True, max_length=8,
    )  # fmt: skip
    shapes = paths.flatten(jax.eval_shape(Model(cfg).init, jax.random.key(0)))
    counted = sum(x.size for path, x in shapes.items() if len(x.shape) == 2 and not paths.matches("embedding", path))
    head = 40 * 16 if tied else 0
    assert flops.matrix_parameters(cfg) == counted + head
