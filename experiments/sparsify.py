"""Makes weights of a trained model zero, at once: by any score, at any share; what that costs, and a workdir of it.

    launch/local.sh -m experiments.sparsify --workdir runs/lm_small --score magnitude,wanda,random --sparsity 0.5,0.7
    launch/local.sh -m experiments.sparsify --workdir runs/lm_small --score wanda --sparsity 0.5 --to runs/pruned
    launch/local.sh -m fastlm.train --config configs/prune/recovery.py

The first prints a table of scores on the test split, before anything is repaired; the second writes a workdir, in which
zeros take a bit (`models.formats`), and from which training goes on with the wrapper "pruned" and method "kept", which
keeps them. A run that had zeros before is packed by --sparsity 0. What the scores look at is gathered on a few rows of
the training data (--source for others). With --update the weights that stay make up for the others (after SparseGPT,
arXiv 2301.00774). With --rewind STEP the zeros are those of the newest weights, and the others what they were at that
step (the lottery ticket of 1803.03635; 1912.05671 for rewinding).
Zeros while a model trains: config.wrappers = ("pruned",), see configs/prune/gradual.py.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import calibration, costs
from fastlm import command_line
from fastlm.compress import importance, masks, prune, surgeon
from fastlm.compress.evidence import PRODUCTS, Evidence
from fastlm.errors import UserError
from fastlm.models import abstract
from fastlm.ops import paths
from fastlm.parallel import mesh as meshes
from fastlm.training import restore, rewritten
from fastlm.training.restore import Restored

FLAGS = flags.FLAGS
Way = tuple[str, str, float]


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    calibration.define_model()
    flags.DEFINE_list("score", ["magnitude"], f"of {', '.join(importance.WEIGHTS)}")
    flags.DEFINE_list("sparsity", ["0.5"], "share of zeros in each matrix; with an N:M allocation that decides")
    flags.DEFINE_list("allocation", ["matrix"], f"of {', '.join(masks.ALLOCATIONS)}, or 2:4")
    flags.DEFINE_multi_string("paths", list(prune.MATRICES), "patterns of the matrices that are pruned")
    flags.DEFINE_bool("update", False, "let the weights that stay make up for the others, by least squares")
    calibration.define_flags()
    costs.define_flags()
    flags.DEFINE_string("rewind", "", "take what is not zero from this step of the run")
    flags.DEFINE_integer("seed", 0, "of random scores", lower_bound=0)
    flags.DEFINE_string("to", "", "workdir to write; must be new or empty")


def zeros(
    params: Any, known: Mapping[str, Evidence], score: str, allocation: str, sparsity: float, seed: int
) -> dict[str, jax.Array]:
    """Returns the masks, ones for what stays."""
    scores = importance.scores(score, paths.flatten(params), known, jax.random.key(seed))
    return masks.allocation(allocation, "--allocation")(scores, sparsity)


def masked(params: Any, chosen: Mapping[str, jax.Array], known: Mapping[str, Evidence], update: bool) -> Any:
    """Returns the parameters with zeros where a mask has some; with `update`, the others make up for them."""

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if path not in chosen:
            return leaf
        if update:
            return surgeon.update(leaf, known[path].products, chosen[path])
        return jnp.where(chosen[path], leaf, 0)

    return paths.map_with_path(one, params)


def ways() -> list[Way]:
    """Returns all that the flags name.

    Raises:
      UserError: a score, an allocation or a share that there is not, or flags that do not go together.
    """
    for name in FLAGS.score:
        importance.of_weights(name, "--score")
    for name in FLAGS.allocation:
        masks.allocation(name, "--allocation")
    shares = calibration.shares(FLAGS.sparsity, "--sparsity")
    found = [(score, allocation, share) for score in FLAGS.score for allocation in FLAGS.allocation for share in shares]
    if FLAGS.rewind and not FLAGS.to:
        raise UserError("--rewind: goes with --to; leave it out")
    if FLAGS.rewind and FLAGS.update:
        raise UserError("--update: fits the newest weights, and --rewind takes earlier ones; leave one out")
    if FLAGS.to and len(found) > 1:
        raise UserError("--to: writes one model; give one score, one allocation and one sparsity")
    return found


def main() -> None:
    """Prunes, and prints what it cost or writes what came out."""
    if not FLAGS.workdir:
        raise UserError("--workdir: name a trained model")
    asked, mesh = ways(), meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step)
    matrices = prune.matrices(abstract(restored.model.cfg)[1], tuple(FLAGS.paths), "--paths")
    needs = {need for name in FLAGS.score for need in importance.WEIGHTS[name].needs}
    known = calibration.evidence_for(restored, mesh, matrices, needs | ({PRODUCTS} if FLAGS.update else set()))
    choose = jax.jit(zeros, static_argnums=(2, 3, 5))
    put = jax.jit(masked, static_argnums=3)
    chosen = lambda way: choose(restored.params, known, *way, FLAGS.seed)
    if FLAGS.to:
        start = restore.restore(FLAGS.workdir, mesh, step=FLAGS.rewind).params if FLAGS.rewind else restored.params
        write(restored, put(start, chosen(asked[0]), known, FLAGS.update), matrices)
        return

    def changed() -> Iterator[tuple[list[str], Restored]]:
        for way in asked:
            found = chosen(way)
            params = put(restored.params, found, known, FLAGS.update)
            yield [*way[:2], f"{float(masks.sparsity(found)):.3f}"], dataclasses.replace(restored, params=params)

    costs.table(restored, mesh, ["score", "allocation", "sparsity:"], changed(), FLAGS.score_batches)


def write(restored: Restored, params: Any, matrices: Sequence[str]) -> None:
    """Writes the workdir of weights with zeros, packed, and says what to do next."""
    command = " ".join(["python -m experiments.sparsify", *sys.argv[1:]])
    size = rewritten.write(FLAGS.workdir, restored, *prune.packed(restored.model.cfg, params), FLAGS.to, command)
    leaves = paths.flatten(params)
    gone = sum(int((leaves[path] == 0).sum()) for path in matrices)
    total = sum(leaves[path].size for path in matrices)
    print(f"{gone:,} of {total:,} weights in {len(matrices)} matrices are zero ({gone / total:.1%})")
    print(f"wrote step 0 to {FLAGS.to}: {size:,} bytes")
    print(f"next: launch/local.sh -m fastlm.evaluate --workdir {FLAGS.to}")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
