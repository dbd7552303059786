import jax.numpy as jnp
import pytest

from fastlm.errors import UserError
from fastlm.ops import paths

TREE = {"model": {"layers": {"1": {"attention": {"q": jnp.ones(2)}}, "10": {"attention_norm": {"scale": jnp.ones(3)}}}}}


def test_flatten_and_map_name_the_same_leaves():
    flat = paths.flatten(TREE)
    assert list(flat) == ["model/layers/1/attention/q", "model/layers/10/attention_norm/scale"]
    named = paths.map_with_path(lambda path, leaf, other: (path, leaf is other), TREE, TREE)
    assert named["model"]["layers"]["1"]["attention"]["q"] == ("model/layers/1/attention/q", True)


def test_sequences_and_tuples_are_named_by_index():
    assert list(paths.flatten({"a": [1, (2, 3)]})) == ["a/0", "a/1/0", "a/1/1"]


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("layers/1", "model/layers/1/attention/q"),
        ("attention", "model/layers/1/attention/q"),
        (".*norm", "model/layers/10/attention_norm/scale"),
        ("layers/.*/scale", "model/layers/10/attention_norm/scale"),
        ("q|zzz", "model/layers/1/attention/q"),
        ("^model/layers/10/attention_norm/scale$", "model/layers/10/attention_norm/scale"),
    ],
)
def test_a_pattern_covers_whole_components(pattern, selected):
    assert [path for path in paths.flatten(TREE) if paths.matches(pattern, path)] == [selected]


def test_mistakes_name_the_nearest_paths():
    with pytest.raises(UserError, match=r"optimizer\.groups: 'layers/1/atention/q' matches no .*layers/1/attention/q"):
        paths.require_match("layers/1/atention/q", paths.flatten(TREE), "optimizer.groups")
    with pytest.raises(UserError, match="not a regular expression"):
        paths.matches("layers/(", "model/layers")
