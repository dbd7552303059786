"""Runs in these tests have one device, of the eight."""

import jax
import pytest

from fastlm.parallel import mesh as meshes


@pytest.fixture
def one_device(no_mesh, monkeypatch):
    """Makes every mesh one of a single device."""
    axis_types = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
    mesh = jax.make_mesh((1,) * len(meshes.AXES), meshes.AXES, axis_types=axis_types, devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make", lambda **sizes: mesh)
