"""Peak memory of reading and writing a model of 200 MB, measured in a fresh process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
ROOT = Path(__file__).parent.parent.parent
TENSORS, ROWS, COLUMNS = 20, 2560, 1024  # 10 MB each in float32
MODEL = TENSORS * ROWS * COLUMNS * 4


def peak_growth(program, *arguments):
    """Bytes by which the resident memory of a process grows at its peak, from its last import on."""
    start = """
        import sys
        import numpy as np
        from fastlm.models.weight_files import open_weights, write_safetensors
        def memory(line):
            return next(int(text.split()[1]) * 1024 for text in open("/proc/self/status") if text.startswith(line))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak of the imports
        before = memory("VmRSS")
    """
    program = textwrap.dedent(start) + textwrap.dedent(program) + '\nprint(memory("VmHWM") - before)\n'
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


WRITE = f"""
    random = np.random.default_rng(0)
    make = lambda: random.random(({ROWS}, {COLUMNS}), np.float32)
    tensors = [(f"t{{i}}", make, ({ROWS}, {COLUMNS}), np.float32) for i in range({TENSORS})]
    write_safetensors(sys.argv[1], tensors, max_shard_bytes=50_000_000)
"""
REWRITE = """
    with open_weights(sys.argv[1]) as source:
        tensors = [(n, lambda n=n: source.read(n), source.shape(n), source.dtype(n)) for n in source.names()]
        write_safetensors(sys.argv[2], tensors)
"""
LOAD = """
    with open_weights(sys.argv[1]) as source:
        model = {name: source.read(name) for name in source.names()}
    assert sum(array.nbytes for array in model.values()) == int(sys.argv[2])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    assert peak_growth(WRITE, folder) < 0.3 * MODEL
    return folder


def test_rewriting_takes_a_few_tensors(model, tmp_path):
    assert peak_growth(REWRITE, model, tmp_path) < 0.3 * MODEL
    assert (tmp_path / "model.safetensors").stat().st_size > MODEL


def test_loading_takes_the_model_and_little_more(model):
    assert MODEL < peak_growth(LOAD, model, MODEL) < 1.3 * MODEL


def test_loading_quantized_takes_the_float32_model_and_little_more(tmp_path):
    write = f"""
        import gguf
        writer = gguf.GGUFWriter(sys.argv[1], "llama")
        values = np.random.default_rng(0).random(({ROWS}, {COLUMNS}), np.float32)
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        for i in range({TENSORS}):
            writer.add_tensor(f"t{{i}}", stored, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    """
    peak_growth(write, tmp_path / "model.gguf")
    assert MODEL < peak_growth(LOAD, tmp_path / "model.gguf", MODEL) < 1.3 * MODEL
