"""fastlm beside transformers, live: the same tiny models of every architecture, in and out again.

    launch/local.sh -m experiments.benchmarks.huggingface_parity --torch-python PYTHON_THAT_HAS_TORCH_AND_TRANSFORMERS

Two to five minutes on 2 cores. For each architecture transformers draws a model at random (another one with
another --seed), saves it and computes; fastlm reads the folder, computes the same in float32, and writes it back;
transformers loads that and computes again. The table shows the largest difference as a share of the largest
logit, whether the likeliest next token agrees at each of the 64 steps of transformers' greedy continuation, whether
the tensors came back bit for bit, and whether transformers then computes the same (1e-6) and misses no weight.
Notable: the two sides share files only (tests/models/make_golden_huggingface.py is the other one).
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastlm.errors import UserError, exit_on_user_error
from fastlm.models import Model, ModelConfig, huggingface
from fastlm.models.weight_files import open_weights

THEIR_SIDE = Path(__file__).parent.parent.parent / "tests" / "models" / "make_golden_huggingface.py"
INPUTS = ("tokens", "mask", "token_types", "target")
PROMPT = 10  # tokens before a greedy continuation, or of its source; as in THEIR_SIDE
LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Parity:
    """One line of the table; `returned` is None until transformers has scored what was written back."""

    case: str
    class_name: str
    parameters: int
    difference: float
    greedy: bool | None
    tensors: bool
    returned: bool | None = None

    @property
    def good(self) -> bool:
        """Whether all of it agrees."""
        return self.difference <= LIMIT and self.greedy is not False and self.tensors and self.returned is not False


def compute(cfg: ModelConfig, params: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Returns logits (hidden states of a body) for rows that are padded on the right."""
    model = Model(cfg)

    def run(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        tokens, mask, options = inputs["tokens"], inputs.get("mask"), {}
        if cfg.encoder_layers:
            options["memory"], _ = model.encode(params, tokens, segment_ids=mask)
            tokens, mask = inputs["target"], None
        hidden, _ = model.features(params, tokens, segment_ids=mask, token_types=inputs.get("token_types"), **options)
        if cfg.head == "sequence":
            hidden = model.pool(hidden, mask)
        return hidden if cfg.head == "none" else model.head(params, hidden)

    with jax.default_matmul_precision("float32"):
        return np.asarray(jax.jit(run)(params, inputs))


def with_greedy(inputs: dict[str, np.ndarray], greedy: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the inputs with one more row: what was continued, with its continuation."""
    read = "target" if "target" in inputs else "tokens"
    longer = {read: _stacked(inputs[read], greedy)}
    if read == "target":
        longer["tokens"] = _stacked(inputs["tokens"], inputs["tokens"][0, :PROMPT])
        longer["mask"] = _stacked(inputs["mask"], np.ones(PROMPT, np.int32))
    return inputs | longer


def _stacked(rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    length = max(rows.shape[1], len(row))
    return np.stack([np.pad(one, (0, length - len(one))) for one in [*rows, row]]).astype(np.int32)


def compare(folder: Path) -> tuple[float, bool | None]:
    """Returns the largest difference as a share of the largest logit, and whether each greedy step agrees."""
    imported, expected = huggingface.read(folder), dict(np.load(folder / "expected.npz"))
    inputs = {name: expected[name] for name in INPUTS if name in expected}
    theirs, greedy = expected["output"], expected.get("greedy")
    ours = compute(imported.cfg, imported.params, inputs if greedy is None else with_greedy(inputs, greedy))
    agrees = None
    if greedy is not None:
        start = 0 if "target" in inputs else PROMPT - 1
        agrees = bool((ours[-1].argmax(-1)[start : len(greedy) - 1] == greedy[start + 1 :]).all())
        ours = ours[:-1, : theirs.shape[1]]
    real = np.ones(ours.shape, bool)
    if "mask" in inputs and ours.ndim == 3 and "target" not in inputs:
        real = np.broadcast_to(inputs["mask"][..., None] > 0, ours.shape)
    return float(np.abs(ours - theirs)[real].max() / np.abs(theirs).max()), agrees


def write_back(folder: Path, target: Path) -> tuple[huggingface.Imported, bool]:
    """Reads a folder and writes it again; returns whether all tensors are the same bits under the same names."""
    imported = huggingface.read(folder)
    huggingface.write(
        target,
        imported.cfg,
        imported.params,
        imported.tokenizer_files,
        architecture=imported.architecture,
        generation=imported.generation,
        labels=imported.labels,
    )
    return imported, same_tensors(folder, target)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    with open_weights(one) as a, open_weights(other) as b:
        same = lambda name: a.dtype(name) == b.dtype(name) and np.array_equal(_bits(a, name), _bits(b, name))
        return set(a.names()) == set(b.names()) and all(same(name) for name in a.names())


def _bits(source: Any, name: str) -> np.ndarray:
    return np.ascontiguousarray(source.read(name)).reshape(-1).view(np.uint8)


def measure(torch_python: str, seed: int, folder: Path) -> list[Parity]:
    """Runs the whole comparison with files below `folder`."""
    call = functools.partial(_call, torch_python)
    call("--out", folder / "theirs", "--seed", seed)
    found = []
    for theirs in sorted((folder / "theirs").iterdir()):
        back = folder / "back" / theirs.name
        difference, greedy = compare(theirs)
        imported, tensors = write_back(theirs, back)
        expected = np.load(theirs / "expected.npz")
        np.savez(back / "inputs.npz", **{name: expected[name] for name in INPUTS if name in expected})
        parameters = sum(leaf.size for leaf in jax.tree.leaves(imported.params))
        found.append(Parity(theirs.name, imported.architecture, parameters, difference, greedy, tensors))
    call("--score", *(folder / "back" / line.case for line in found))
    return [dataclasses.replace(line, returned=_returned(folder, line.case)) for line in found]


def _call(torch_python: str, *arguments: object) -> None:
    done = subprocess.run([torch_python, str(THEIR_SIDE), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(
            f"{torch_python}: the side of transformers failed ({reason}); does it have torch and transformers?"
        )


def _returned(folder: Path, case: str) -> bool:
    scored, expected = (
        np.load(folder / "back" / case / "scored.npz"),
        np.load(folder / "theirs" / case / "expected.npz"),
    )
    largest = np.abs(expected["output"]).max()
    same = np.abs(scored["output"] - expected["output"]).max() <= 1e-6 * largest  # rounding depends on alignment
    if "greedy" in expected:
        same = same and np.array_equal(scored["greedy"], expected["greedy"])
    return bool(same) and json.loads(str(scored["problems"])) == {}


def table(lines: list[Parity]) -> str:
    """Returns the result as Markdown."""
    shown = {True: "yes", False: "NO", None: "-"}
    head = "| case | class | parameters | difference / largest | greedy 64 | bits back | transformers again |\n"
    rows = [
        f"| {line.case} | {line.class_name} | {line.parameters:,} | {line.difference:.1e} | {shown[line.greedy]} | "
        f"{shown[line.tensors]} | {shown[line.returned]} |"
        for line in lines
    ]
    return head + "|---|---|---|---|---|---|---|\n" + "\n".join(rows)


def main() -> None:
    """Reads the command line and prints the table; status 1 if anything disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
        lines = measure(arguments.torch_python, arguments.seed, Path(folder))
    print(table(lines))
    sys.exit(0 if all(line.good for line in lines) else 1)


if __name__ == "__main__":
    main()
