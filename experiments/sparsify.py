"""Makes weights of a trained model zero, at once: by any score, at any share; what that costs, and a workdir of it.

    launch/local.sh -m experiments.sparsify --workdir runs/lm_small --score magnitude,wanda,random --sparsity 0.5,0.7
    launch/local.sh -m experiments.sparsify --workdir runs/lm_small --score wanda --sparsity 0.5 --to runs/pruned
    launch/local.sh -m fastlm.train --config configs/prune/recovery.py

The first prints a table of scores on the test split, before anything is repaired; the second writes a workdir, in which
training goes on with the wrapper "pruned" and method "kept", which keeps the zeros. What the scores look at is gathered
on a few rows of the training data (--source for others). With --rewind STEP the zeros are those of the newest weights,
and the others what they were at that step (the lottery ticket of arXiv 1803.03635; 1912.05671 for rewinding).
Zeros while a model trains: config.wrappers = ("pruned",), see configs/prune/gradual.py.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from experiments import calibration
from fastlm import command_line
from fastlm.compress import importance, masks, prune
from fastlm.compress.evidence import Evidence
from fastlm.errors import UserError
from fastlm.models import abstract
from fastlm.ops import paths
from fastlm.parallel import mesh as meshes
from fastlm.training import quality, restore, rewritten
from fastlm.training.restore import Restored

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
    flags.DEFINE_string("step", "", "checkpoint of it: a number, 'best', or nothing for the newest")
    flags.DEFINE_list("score", ["magnitude"], f"of {', '.join(importance.WEIGHTS)}")
    flags.DEFINE_list("sparsity", ["0.5"], "share of zeros in each matrix; with an N:M allocation that decides")
    flags.DEFINE_list("allocation", ["matrix"], f"of {', '.join(masks.ALLOCATIONS)}, or 2:4")
    flags.DEFINE_multi_string("paths", list(prune.MATRICES), "patterns of the matrices that are pruned")
    calibration.define_flags()
    flags.DEFINE_integer("score_batches", 0, "batches of the test split to score; 0 for all", lower_bound=0)
    flags.DEFINE_string("rewind", "", "take what is not zero from this step of the run")
    flags.DEFINE_integer("seed", 0, "of random scores", lower_bound=0)
    flags.DEFINE_string("to", "", "workdir to write; must be new or empty")


def shares(texts: Sequence[str]) -> list[float]:
    """Reads shares of zeros.

    Raises:
      UserError: one is no number from 0 to 1.
    """
    found = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"--sparsity: '{text}' is no share from 0 to 1")
        found.append(value)
    return found


def zeros(
    params: Any, known: Mapping[str, Evidence], score: str, allocation: str, sparsity: float, seed: int
) -> dict[str, jax.Array]:
    """Returns the masks, ones for what stays."""
    scores = importance.scores(score, paths.flatten(params), known, jax.random.key(seed))
    return masks.allocation(allocation, "--allocation")(scores, sparsity)


def masked(params: Any, chosen: Mapping[str, jax.Array]) -> Any:
    """Returns the parameters with zeros where a mask has some."""
    return paths.map_with_path(
        lambda path, leaf: jax.numpy.where(chosen[path], leaf, 0) if path in chosen else leaf, params
    )


def main() -> None:
    """Prunes, and prints what it cost or writes what came out."""
    if not FLAGS.workdir:
        raise UserError("--workdir: name a trained model")
    for name in FLAGS.score:
        importance.of_weights(name, "--score")
    for name in FLAGS.allocation:
        masks.allocation(name, "--allocation")
    ways = [
        (score, allocation, sparsity)
        for score in FLAGS.score
        for allocation in FLAGS.allocation
        for sparsity in shares(FLAGS.sparsity)
    ]
    if FLAGS.rewind and not FLAGS.to:
        raise UserError("--rewind: goes with --to; leave it out")
    if FLAGS.to and len(ways) > 1:
        raise UserError("--to: writes one model; give one score, one allocation and one sparsity")
    mesh = meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step)
    start = restore.restore(FLAGS.workdir, mesh, step=FLAGS.rewind).params if FLAGS.rewind else restored.params
    matrices = prune.matrices(abstract(restored.model.cfg)[1], tuple(FLAGS.paths), "--paths")
    known = calibration.seen(restored, mesh, matrices, FLAGS.score)
    prune_as = jax.jit(
        lambda params, known, sparsity, score, allocation: zeros(
            params, known, score, allocation, sparsity, FLAGS.seed
        ),
        static_argnums=(3, 4),
    )
    chosen = lambda way: prune_as(restored.params, known, way[2], way[0], way[1])
    if FLAGS.to:
        write(restored, start, chosen(ways[0]))
    else:
        table(restored, mesh, ways, chosen)


def write(restored: Restored, params: Any, chosen: Mapping[str, jax.Array]) -> None:
    """Writes the workdir of these weights with zeros, and says what to do next."""
    command = " ".join(["python -m experiments.sparsify", *sys.argv[1:]])
    size = rewritten.write(FLAGS.workdir, restored, restored.model.cfg, masked(params, chosen), FLAGS.to, command)
    gone = sum(int((~mask).sum()) for mask in chosen.values())
    total = sum(mask.size for mask in chosen.values())
    print(f"{gone:,} of {total:,} weights in {len(chosen)} matrices are zero ({gone / total:.1%})")
    print(f"wrote step 0 to {FLAGS.to}: {size:,} bytes")
    print(f"next: launch/local.sh -m fastlm.evaluate --workdir {FLAGS.to}")


def table(restored: Restored, mesh: Mesh, ways: Sequence[tuple[str, str, float]], chosen: Any) -> None:
    """Prints what each way costs on the test split, a line as soon as it is known."""
    asked = quality.Asked(batches=FLAGS.score_batches)
    score = lambda params: quality.score(dataclasses.replace(restored, params=params), mesh, asked).metrics
    before = score(restored.params)
    names = [name for name in ("bits_per_byte", "accuracy", "loss") if name in before][:2]
    print("| score | allocation | sparsity |" + "".join(f" {name} |" for name in names))
    print("|---|---|---:|" + "---:|" * len(names))
    print("| (unpruned) | | 0 |" + "".join(f" {before[name]:.4f} |" for name in names), flush=True)
    for way in ways:
        found = chosen(way)
        metrics, share = score(masked(restored.params, found)), float(masks.sparsity(found))
        cells = "".join(f" {metrics[name]:.4f} |" for name in names)
        print(f"| {way[0]} | {way[1]} | {share:.3f} |{cells}", flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
