"""Eight CPU devices, a compilation cache, and data prepared once for the whole suite."""

import os
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache" / "tests"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["FASTLM_CACHE"] = str(_CACHE)
os.environ["FASTLM_DATA"] = str(_CACHE / "data")

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_compilation_cache_dir", str(_CACHE / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
settings.register_profile("fastlm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastlm")


@pytest.fixture
def no_mesh():
    """Leaves no mesh in force after a test that sets one."""
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)
