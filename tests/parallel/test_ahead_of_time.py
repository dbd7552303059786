"""The train step and the attention kernels compile for TPUs, on a machine without any."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.models.attention import KINDS

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).with_name("ahead_of_time_programs.py")
ROOT = PROGRAMS.parent.parent.parent


def libtpu_requirement():
    """What jax's own extra asks for, "libtpu==0.0.42.*"."""
    extra = [line for line in importlib.metadata.requires("jax") if line.startswith("libtpu") and "tpu" in line]
    return extra[0].partition(";")[0].strip()


@pytest.fixture(scope="session")
def libtpu():
    """The library's path; pip fetches it once, some 200 MB, into the cache folder."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86_64 only")
    requirement = libtpu_requirement()
    folder = Path(os.environ["FASTLM_CACHE"]) / "packages" / re.sub(r"[^a-z0-9.]+", "-", requirement).strip("-.")
    if not folder.exists():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(aside), requirement]
        fetched = subprocess.run(command, capture_output=True, text=True)
        if fetched.returncode:
            shutil.rmtree(aside, ignore_errors=True)
            pytest.skip(f"pip cannot fetch {requirement}")
        aside.rename(folder)
    return folder / "libtpu" / "libtpu.so"


def compile_elsewhere(name, library=None, *arguments):
    """Runs one function of the programs in a fresh process and returns what it found."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "XLA_FLAGS"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"}
    if library:  # several processes may have it, as nothing holds a chip
        environment |= {"TPU_LIBRARY_PATH": str(library), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), name, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_sharded_train_step_compiles_for_eight_chips(libtpu):
    found = compile_elsewhere("train_step", libtpu)
    sharded, alone = found["sharded"], found["alone"]
    assert sharded["splash"] and alone["splash"]
    assert sharded["collectives"] > 0 and alone["collectives"] == 0
    # Per chip: weights and moments are cut by fsdp x tensor, rows by data x fsdp, and products by all three.
    assert sharded["arguments"] < 0.3 * alone["arguments"]
    assert sharded["temporaries"] < 0.5 * alone["temporaries"]
    assert 1 / 10 < sharded["flops"] / alone["flops"] < 1 / 4
    assert sharded["aliased"] > 0.95 * sharded["arguments"]  # the donated state is written in place


def test_remat_policies_store_less_and_compute_more(libtpu):
    found = compile_elsewhere("remat", libtpu)
    none, products, full = (found[name] for name in ("none", "products", "full"))
    assert none["temporaries"] > products["temporaries"] > full["temporaries"]
    assert none["flops"] < full["flops"]


def test_the_splash_form_compiles_for_a_tpu_forward_and_backward(libtpu):
    found = compile_elsewhere("attention_forms", libtpu)
    assert {name: program["splash"] for name, program in found.items()} == dict.fromkeys(
        ("causal", "packed", "capped"), True
    )


@pytest.mark.parametrize("name", list(KINDS))
def test_every_attention_kind_compiles_for_a_tpu_and_uses_its_kernel(name, libtpu):
    found = compile_elsewhere("attention_kind", libtpu, name)
    assert found["splash"] == (name in ("full", "local", "block_sparse", "linformer"))
    assert (found["kernels"] > 0) == (found["splash"] or name in ("linear", "performer"))


def test_the_fused_form_lowers_for_cuda_to_cudnn_where_that_takes_the_lengths():
    assert compile_elsewhere("fused_for_cuda", None, "256") == {"kernels": 2, "products": 0}
    odd = compile_elsewhere("fused_for_cuda", None, "255")
    assert odd["kernels"] == 0 and odd["products"] >= 2
