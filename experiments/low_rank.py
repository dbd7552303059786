"""Two thin matrices in the place of each of a model's: what that costs, by method and share, and a workdir of it.

    launch/local.sh -m experiments.low_rank --workdir runs/lm_small --method svd,whitened,fisher --share 0.5,0.7
    launch/local.sh -m experiments.low_rank --workdir runs/lm_small --method fisher --share 0.5 --to runs/low_rank
    launch/local.sh -m fastlm.train --config configs/low_rank/recovery.py

The first prints a table on the test split, before anything is repaired; the second writes a workdir of the factors,
which trains, generates and is measured as any, and is merged again where a format for others has no factors (Hugging
Face, GGUF). What inputs are like is gathered on a few rows of the training data (--source for others).
Of how methods and allocations differ: `fastlm.compress.low_rank`.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments import calibration, costs
from fastlm import command_line
from fastlm.compress import low_rank, prune
from fastlm.compress.evidence import Evidence
from fastlm.errors import UserError, nearest
from fastlm.models import Model, ModelConfig, abstract
from fastlm.ops import paths
from fastlm.ops.leaves import LowRank
from fastlm.parallel import mesh as meshes
from fastlm.search.shapes import parameters_of
from fastlm.training import restore, rewritten
from fastlm.training.restore import Restored

FLAGS = flags.FLAGS
Way = tuple[str, str, float]


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    calibration.define_model()
    flags.DEFINE_list("method", ["fisher"], f"of {', '.join(low_rank.METHODS)}")
    flags.DEFINE_list("share", ["0.5"], "of the numbers of all these matrices, that are left")
    flags.DEFINE_list("allocation", ["size"], f"of ranks: {', '.join(low_rank.ALLOCATIONS)}")
    flags.DEFINE_integer("multiple", 8, "of which ranks are multiples", lower_bound=1)
    flags.DEFINE_multi_string("paths", list(prune.MATRICES), "patterns of the matrices that are factorised")
    calibration.define_flags()
    costs.define_flags()
    flags.DEFINE_string("to", "", "workdir to write; must be new or empty")


def ways() -> list[Way]:
    """Returns all that the flags name.

    Raises:
      UserError: a method, an allocation or a share that there is not.
    """
    for name in FLAGS.method:
        low_rank.method(name, "--method")
    for name in FLAGS.allocation:
        if name not in low_rank.ALLOCATIONS:
            known = low_rank.ALLOCATIONS
            raise UserError(f"--allocation: no '{name}'{nearest(name, known)}; one of: {', '.join(known)}")
    shares = calibration.shares(FLAGS.share, "--share")
    found = [(name, allocation, share) for name in FLAGS.method for allocation in FLAGS.allocation for share in shares]
    if FLAGS.to and len(found) > 1:
        raise UserError("--to: writes one model; give one method, one allocation and one share")
    return found


def factorised(params: Any, known: Mapping[str, Evidence], name: str) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """Returns the factors of full rank of each matrix, and its singular values on the host."""
    leaves, one = paths.flatten(params), jax.jit(low_rank.factors, static_argnums=2)
    full = {path: one(leaves[path], seen, name) for path, seen in known.items()}
    return {path: leaf for path, (leaf, _) in full.items()}, jax.device_get({path: s for path, (_, s) in full.items()})


def models(restored: Restored, known: Mapping[str, Evidence], asked: Sequence[Way]) -> Iterator[tuple[Way, Restored]]:
    """Yields the models of all ways; factors of full rank are made once for each method."""
    cfg, made = restored.model.cfg, ("", None, None)
    leaves = paths.flatten(restored.params)
    sides = {path: leaves[path].shape for path in known}
    for name, allocation, share in asked:
        if made[0] != name:
            made = (name, *factorised(restored.params, known, name))
        chosen = low_rank.ranks(made[2], sides, share, allocation, FLAGS.multiple)
        if not chosen:
            raise UserError(f"--share: at {share} no matrix is worth factorising; give less")
        small, params = low_rank.with_ranks(cfg, restored.params, made[1], chosen)
        yield (
            (name, allocation, share),
            dataclasses.replace(restored, model=Model(small, restored.model.compute), params=params),
        )


def main() -> None:
    """Factorises, and prints what it cost or writes what came out."""
    if not FLAGS.workdir:
        raise UserError("--workdir: name a trained model")
    asked, mesh = ways(), meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step)
    cfg = restored.model.cfg
    if cfg.formats:
        raise UserError(f"{FLAGS.workdir}: has factors already; factorise the model that they were made of")
    matrices = prune.matrices(abstract(cfg)[1], tuple(FLAGS.paths), "--paths")
    needs = {need for name in FLAGS.method for need in low_rank.METHODS[name].needs}
    known = calibration.evidence_for(restored, mesh, matrices, needs)
    if FLAGS.to:
        ((_, found),) = models(restored, known, asked)
        write(restored, found)
    else:
        total = parameters_of(cfg)[0]
        left = lambda found: f"{parameters_of(found.model.cfg)[0] / total:.3f}"
        rows = (([*way[:2], f"{way[2]:.2f}", left(found)], found) for way, found in models(restored, known, asked))
        costs.table(restored, mesh, ["method", "allocation", "share:", "of all parameters:"], rows, FLAGS.score_batches)


def write(restored: Restored, found: Restored) -> None:
    """Writes the workdir of a factorised model, and says what to do next."""
    command = " ".join(["python -m experiments.low_rank", *sys.argv[1:]])
    size = rewritten.write(FLAGS.workdir, restored, found.model.cfg, found.params, FLAGS.to, command)
    described(restored.model.cfg, found.model.cfg)
    print(f"wrote step 0 to {FLAGS.to}: {size:,} bytes")
    print(f"next: launch/local.sh -m fastlm.evaluate --workdir {FLAGS.to}")


def described(cfg: ModelConfig, small: ModelConfig) -> None:
    """Prints ranks, and how many parameters are left."""
    for path, text in small.formats:
        print(f"{path}: {text}")
    before, after = parameters_of(cfg)[0], parameters_of(small)[0]
    print(f"{after:,} of {before:,} parameters ({after / before:.3f})")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
