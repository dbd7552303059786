"""StableHLO: a model's programs for any XLA runtime, compiled where they run, with the weights beside them.

    FOLDER/forward.stablehlo ...    one file for each program of `programs`, for cpu, cuda and tpu
    FOLDER/weights.safetensors      the weights by path
    FOLDER/signature.json           what goes in and comes out

Notable: nothing of fastlm is needed to run them, only `jax.export` (or another reader of its format); versions are
those that `jax.export` promises to read later. Rows, tokens and slots are symbols; for attention that cuts rows into
chunks the number of tokens is fixed, and shorter rows are padded.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from fastlm.exports.exported_programs import SIGNATURE
from fastlm.exports.programs import Program, flat, programs, told_of
from fastlm.models import Model
from fastlm.models.weight_files.writing import write_safetensors

HOW_TO_RUN = """
## How to run it

```python
import json
import numpy as np
from jax import export
from safetensors.numpy import load_file

weights = load_file("weights.safetensors")
signature = json.load(open("signature.json"))["programs"]  # what goes in and comes out, with symbols for sizes
forward = export.deserialize(bytearray(open("forward.stablehlo", "rb").read()))
given = {name: np.ones((1, 8), np.int32) for name in signature["forward"]["inputs"]}
print(forward.call(weights, given))
```

A decoder writes with `prefill` and then `decode`: a cache begins as zeros in the shapes of `signature` (b rows, c
slots: prompt and continuation together), each call takes the one that the last returned. With fastlm at hand:
`python -m fastlm.generate --workdir FOLDER --runtime stablehlo`.
"""
PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"
WEIGHTS = "weights.safetensors"


def write(folder: Path, model: Model, params: Any, length: int | None = None) -> list[str]:
    """Writes a model into a folder and returns the names of the files.

    Args:
      length: tokens of a row, for models whose programs have a fixed number.

    Raises:
      UserError: the model needs `length`, or keeps a cache that has no such form.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = programs(model, shapes, length, documents=True, empty=True)
    signature: dict[str, Any] = {"weights": WEIGHTS, "platforms": PLATFORMS, "programs": {}}
    for name, program in found.items():
        exported = lowered(name, program, flat(shapes))
        (folder / f"{name}{SUFFIX}").write_bytes(exported.serialize())
        outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        signature["programs"][name] = {
            "file": f"{name}{SUFFIX}",
            "inputs": {key: _described(value) for key, value in program.inputs.items()},
            "outputs": {key: _described(value) for key, value in outputs.items()},
            "calling_convention_version": exported.calling_convention_version,
        }
    tensors = [(name, np.asarray(leaf), leaf.shape, leaf.dtype) for name, leaf in flat(params).items()]
    write_safetensors(folder / WEIGHTS, tensors, {"format": "jax"})
    files = [*(f"{name}{SUFFIX}" for name in found), WEIGHTS]
    signature["sizes"] = {name: (folder / name).stat().st_size for name in files}
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n")
    return [*files, SIGNATURE]


def lowered(name: str, program: Program, weights: dict[str, jax.ShapeDtypeStruct]) -> export.Exported:
    """Returns a program as StableHLO.

    Raises:
      UserError: it is none for rows of any length.
    """
    with told_of(name):
        return export.export(jax.jit(program.call), platforms=PLATFORMS)(weights, program.inputs)


def _described(shape: jax.ShapeDtypeStruct | jax.core.ShapedArray) -> dict[str, Any]:
    return {"shape": [size if isinstance(size, int) else str(size) for size in shape.shape], "dtype": str(shape.dtype)}
