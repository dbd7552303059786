"""Config sections become calls; every mistake is one line with section, key and the nearest valid key."""

import pytest

from fastlm import configuration
from fastlm.errors import UserError
from fastlm.models import ModelConfig


def target(*, size: int, rate: float = 0.5, name: str = "a", sizes: int | tuple[int, ...] = 1, given: object = None):
    return size, rate, name, sizes, given


def test_values_reach_the_target():
    assert configuration.make(target, "t", {"size": 3, "rate": 1, "sizes": [1, 2]}, given="g") == (
        3,
        1.0,
        "a",
        (1, 2),
        "g",
    )


def test_whole_numbers_become_fractions_where_meant():
    assert isinstance(configuration.make(target, "t", {"size": 3, "rate": 1})[1], float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1, "raet": 2.0}, "config.t.raet: no such key; did you mean 'rate'?"),
        ({"size": "x"}, "config.t.size: expected int, got 'x' (str)"),
        ({"size": True}, "config.t.size: expected int, got True (bool)"),
        ({"size": 1, "rate": "fast"}, "config.t.rate: expected float, got 'fast' (str)"),
        ({"size": 1, "sizes": (1, "2")}, "config.t.sizes: expected int | tuple[int, ...], got (1, '2') (tuple)"),
        ({"rate": 1.0}, "config.t: missing key(s) size"),
        ({"size": 1, "given": 2}, "config.t.given: no such key"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError) as caught:
        configuration.make(target, "t", values, given=None)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30, "heads": 4}, "width 30 is not divided by 4 heads"),
        ({"width": 32, "heads": 4, "kv_heads": 3}, "3 kv_heads do not divide 4 heads"),
        ({"width": 12, "heads": 4}, "rotary positions need an even head_dim"),
        ({"norm": "layernorm"}, "config.model.norm: unknown 'layernorm'; did you mean 'layer_norm'?"),
        ({"layers": 3, "heads": (1, 2)}, "config.model.heads: 2 values for 3 layers"),
        ({"layers": 2, "attention": ("full",) * 3}, "config.model.attention: a pattern of 3 does not tile 2 layers"),
        ({"dropout": 1.0}, "config.model.dropout: must be in [0, 1)"),
        ({"heads": 0}, "config.model.heads: must be at least 1"),
        ({"heads": (4, 0), "layers": 2}, "config.model.heads: must be at least 1"),
        ({"norm_epsilon": 0.0}, "config.model.norm_epsilon: must be a positive number"),
        ({"rotary_base": float("nan")}, "config.model.rotary_base: must be a positive number"),
        ({"logit_softcap": -1.0}, "config.model.logit_softcap: must not be negative"),
        ({"formats": ((".*", "int4"),)}, "config.model.formats: no format 'int4'"),
        ({"layers": 0}, "config.model.layers: must be at least 1"),
        ({"feed_forward": "gulu"}, "config.model.feed_forward: unknown 'gulu'; did you mean 'gelu'?"),
    ],
)
def test_impossible_architectures_are_refused(values, message):
    with pytest.raises(UserError, match=".*") as caught:
        configuration.make(ModelConfig, "model", values)
    assert message in str(caught.value)


def test_model_config_survives_json():
    cfg = ModelConfig(
        vocab_size=7, layers=3, heads=(2, 4, 4), width=64, attention=("full",), feed_forward=("gelu", "swiglu")
    )
    assert ModelConfig.from_json(cfg.to_json()) == cfg
    assert [cfg.layer(i).feed_forward for i in range(3)] == ["gelu", "swiglu", "gelu"]
    assert [cfg.layer(i).head_dim for i in range(3)] == [32, 16, 16]
