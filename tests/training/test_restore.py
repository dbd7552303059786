"""Restoring a model for use: products fused, weights in eight bits, read a layer at a time."""

import jax
import numpy as np
import pytest

from fastlm.decoding import sample
from fastlm.models import fusion, rounding
from fastlm.ops.leaves import Rounded
from fastlm.parallel import mesh as meshes
from fastlm.training import build, checkpoints, loop, restore


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of one step, of a model whose matrices are large enough to be rounded, with averaged weights."""
    from configs import base

    config = base.get_config().to_dict()
    config["tokenizer"]["kind"] = "bytes"
    config["model"] |= {"layers": 2, "width": 128, "heads": 2, "max_length": 32, "feed_forward": "swiglu"}
    config["compute"]["dtype"] = "float32"
    config["data"] |= {"sources": ((corpus, 1.0),), "length": 16, "batch_size": 8}
    config["training"] |= {"steps": 1, "average_decay": 0.5}
    config["evaluation"] |= {"every": 0, "final_split": ""}
    config["logging"] |= {"tensorboard": False}
    config["sample"]["prompts"] = ()
    workdir = tmp_path_factory.mktemp("restored") / "run"
    mesh = jax.sharding.get_mesh()
    loop.run(build.build(config, workdir), say=lambda text: None)
    jax.set_mesh(mesh)
    return workdir


def written(restored):
    how = sample.Sampling(temperature=0.0)
    chunks = sample.generate(restored.model, restored.params, [[3, 5, 7], [2]], max_tokens=6, how=how)
    return np.concatenate(list(chunks), axis=1)


@pytest.mark.parametrize("average", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rounding_while_reading_gives_what_rounding_the_whole_gives(run, average, monkeypatch):
    mesh = meshes.make()
    plain = restore.restore(run, mesh, average=average)
    fused = fusion.fuse(plain.model.cfg, plain.params)
    for options, (cfg, params) in (({"fused": True}, fused), ({}, (plain.model.cfg, plain.params))):
        found = restore.restore(run, mesh, average=average, weights="int8", **options)
        assert found.model.cfg == cfg and found.step == plain.step
        wanted = rounding.round_weights(params)
        assert jax.tree.structure(found.params) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found.params, wanted)
    leaves = jax.tree.leaves(found.params, is_leaf=lambda leaf: isinstance(leaf, Rounded))
    assert sum(isinstance(leaf, Rounded) for leaf in leaves) > 12


def test_one_layer_at_a_time_is_read_as_it_is_stored(run):
    target = restore.restore(run, meshes.make(), average=False).params
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), target)
    parts = []
    files = checkpoints.Checkpoints(run, read_only=True)
    whole = files.restore_parts(1, shapes, lambda part: parts.append(part) or part)
    jax.tree.map(np.testing.assert_array_equal, whole, target)
    assert {name: list(part[name]) for part in parts for name in part if name != "layers"}.keys() < set(target)
    assert [list(part["layers"]) for part in parts if "layers" in part] == [["0"], ["1"]]


def test_fused_products_write_the_same_and_weights_that_are_cut_stay(run):
    plain, fused = (restore.restore(run, meshes.make(), fused=value) for value in (False, True))
    assert "qkv" in fused.params["layers"]["0"]["attention"] and fused.model.cfg.fused
    np.testing.assert_array_equal(written(fused), written(plain))
    mesh = meshes.share_weights(2)
    cut = restore.restore(run, mesh, fused=True)
    assert "q" in cut.params["layers"]["0"]["attention"] and not cut.model.cfg.fused
