"""Live beside transformers, with models no golden file has seen.

Needs torch and transformers, which nothing here installs: in this Python or in the one that FASTLM_TORCH_PYTHON names.
"""

import importlib.util
import os
import sys

import pytest

from experiments.benchmarks import huggingface_parity

TORCH_PYTHON = os.environ.get("FASTLM_TORCH_PYTHON")
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TORCH_PYTHON or INSTALLED),
        reason="torch and transformers are not installed, and FASTLM_TORCH_PYTHON names no Python that has them",
    ),
]


def test_every_architecture_agrees_with_transformers(tmp_path):
    lines = huggingface_parity.measure(TORCH_PYTHON or sys.executable, seed=100, folder=tmp_path)
    assert all(line.good and line.returned for line in lines), huggingface_parity.table(lines)
