"""Eight CPU devices, a compilation cache, and data prepared once for the whole suite."""

import os
import signal
from pathlib import Path

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

_CACHE = Path(__file__).parent.parent / ".cache" / "tests"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what tests take; machine code that runs once need not be good. What XLA decides stays as it is.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICKLY_COMPILED}"
)
os.environ["FASTLM_CACHE"] = str(_CACHE)
os.environ["FASTLM_DATA"] = str(_CACHE / "data")

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_compilation_cache_dir", str(_CACHE / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
settings.register_profile("fastlm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastlm")


_NO_MESH = jax.sharding.get_mesh()


@pytest.fixture(autouse=True)
def no_mesh():
    """Each test begins and ends without a mesh in force: arrays made under one are committed to its devices."""
    jax.set_mesh(_NO_MESH)
    yield
    jax.set_mesh(_NO_MESH)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A source spec: 150 small documents of pseudo-words, the same in every run."""
    import random

    folder = tmp_path_factory.mktemp("corpus")
    random.seed(7)
    words = ["".join(random.choices("abcdefgh ", k=random.randint(2, 7))) for _ in range(60)]
    for i in range(150):
        text = " ".join(random.choices(words, k=random.randint(20, 60)))
        (folder / f"{i:03d}.txt").write_text(text)
    return f"text:{folder}/*.txt"


@pytest.fixture
def tiny_config(corpus, tmp_path):
    """A config, as plain dicts, of a run that takes a second after compilation."""
    from configs import base

    config = base.get_config().to_dict()
    config["tokenizer"]["kind"] = "bytes"
    config["model"] |= {"layers": 1, "width": 16, "heads": 2, "max_length": 64}
    config["compute"]["dtype"] = "float32"
    config["data"] |= {"sources": ((corpus, 1.0),), "length": 32, "batch_size": 8}
    config["mesh"] |= {"data": 1}
    config["training"]["steps"] = 12
    config["evaluation"] |= {"every": 6, "batches": 2, "split": "validation", "final_split": "test"}
    config["checkpoint"] |= {"every": 4, "keep": 2}
    config["logging"] |= {"every": 3, "tensorboard": False}
    return config
