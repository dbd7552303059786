"""Writes reference.safetensors with the reference implementation: pip install safetensors, then run this file.

The test writes the same tensors with fastlm and compares bytes.
"""

from pathlib import Path

import numpy as np


def tensors():
    """Names that need escapes and sorting; several sizes of number, a scalar and an empty tensor."""
    return {
        "layers.10.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layers.2.weight": -np.arange(6, dtype=np.float32).reshape(3, 2),
        "half": np.array([1.5, -0.25, np.inf], np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "step": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "bytes": np.array([1, 2, 255], np.uint8),
        'a "quoted" né\n': np.array([1 / 3], np.float64),
    }


if __name__ == "__main__":
    from safetensors.numpy import save_file

    save_file(tensors(), Path(__file__).with_name("reference.safetensors"), metadata={"format": "pt"})
