"""A smaller model out of a trained one: layers, heads, feed-forward units and hidden units that matter, cut out.

    launch/local.sh -m experiments.prune --workdir runs/lm_small --feed_forward_width 512 --heads 3 --to runs/cut
    launch/local.sh -m experiments.prune --workdir runs/lm_small --heads 3 --score magnitude,taylor,wanda,random
    launch/local.sh -m experiments.prune --workdir runs/smollm2 --layers influence --layer_count 20 --to runs/cut

With --to it writes a workdir of the smaller model, which everything here reads, and which training starts from
(config.init.source), best with the whole model for a teacher. Without it prints what the cut costs on the test split,
for each score. Units are as many in all layers. A score of weights becomes one of units by adding up what reads from
each (`importance.of_units`); --layers takes numbers, "evenly", or "influence": those that turn the stream most (arXiv
2403.03853). What the scores look at is gathered on a few rows of the training data (--source for others).
--dead cuts out, exactly, what gates closed (configs/prune/gates.py).
Papers: Minitron (2407.14679) for scores by activation on little data, sorted and sliced.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import calibration, costs
from fastlm import command_line
from fastlm.compress import gates, importance
from fastlm.compress.importance import Scores
from fastlm.compress.parts import EVENLY, Part, layers_named
from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig, slicing, units
from fastlm.ops import paths
from fastlm.parallel import mesh as meshes
from fastlm.search import clock, latencies, layer_sizes, sensitivity
from fastlm.search.shapes import parameters_of
from fastlm.training import restore, rewritten
from fastlm.training.restore import Restored

FLAGS = flags.FLAGS
INFLUENCE = "influence"
ROUNDS, CLOSE = 4, 1.03  # of measuring what was predicted, until it is as close as this


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    calibration.define_model()
    flags.DEFINE_list("score", ["wanda"], f"of {', '.join(importance.WEIGHTS)}")
    flags.DEFINE_string("layers", "", "which to keep: '0,2,4', 'evenly' or 'influence'; all by default")
    flags.DEFINE_integer("layer_count", 0, "with 'evenly' or 'influence': how many", lower_bound=0)
    flags.DEFINE_integer("width", 0, "hidden units to keep; 0 for all", lower_bound=0)
    flags.DEFINE_integer("heads", 0, "heads to keep in each layer; 0 for all", lower_bound=0)
    flags.DEFINE_string(
        "readings", "", "readings.json of experiments.sensitivity, by which each layer has its own sizes"
    )
    flags.DEFINE_bool(
        "dead", False, "cut out, exactly, the heads and units that nothing reads (config.wrappers 'gated')"
    )
    flags.DEFINE_float("budget", 0.5, "with --readings: share of the numbers of all layers, that is kept")
    flags.DEFINE_float("speed", 0.0, "with --readings, instead of --budget: how many times as fast, by unit timings")
    flags.DEFINE_integer("rows", 1, "of that speed", lower_bound=1)
    flags.DEFINE_integer("length", 128, "tokens of a row that are read, for that speed", lower_bound=1)
    flags.DEFINE_integer("tokens", 32, "that are written behind them, where the model writes", lower_bound=8)
    flags.DEFINE_integer("feed_forward_width", 0, "feed-forward units to keep in each layer; 0 for all", lower_bound=0)
    calibration.define_flags()
    costs.define_flags()
    flags.DEFINE_integer("seed", 0, "of random scores", lower_bound=0)
    flags.DEFINE_string("to", "", "workdir to write; must be new or empty")


@contextlib.contextmanager
def by_flags() -> Iterator[None]:
    """Names the flags where a part of a model names keys of a config."""
    try:
        yield
    except UserError as error:
        told = str(error).replace("config.model.layers", "--layer_count").replace("config.init.", "--")
        raise UserError(told) from error


def layers_of(restored: Restored, mesh: Mesh) -> tuple[int, ...] | None:
    """Returns the layers that --layers keeps; None for all.

    Raises:
      UserError: it names none.
    """
    cfg, count = restored.model.cfg, FLAGS.layer_count
    if count and FLAGS.layers not in (EVENLY, INFLUENCE):
        raise UserError(f"--layer_count: goes with --layers {EVENLY} or {INFLUENCE}; leave it out")
    if FLAGS.layers != INFLUENCE:
        with by_flags():
            return layers_named(FLAGS.layers, cfg, count or None, None)
    if not 0 < count <= cfg.layers:
        raise UserError(f"--layer_count: {count} of {cfg.layers} layers cannot be kept; give 1 to {cfg.layers}")
    scores = calibration.influences(restored, mesh)
    print("influence of layers: " + ", ".join(f"{i} {score:.3f}" for i, score in enumerate(scores)), flush=True)
    return tuple(sorted(int(i) for i in np.argsort(-scores, kind="stable")[:count]))


def part_of(restored: Restored, mesh: Mesh) -> Part:
    """Returns what the flags keep.

    Raises:
      UserError: they do not go together, or name what is not there.
    """
    if FLAGS.readings or FLAGS.dead:
        names = ["layers", "layer_count", "heads", "feed_forward_width"]
        for name in names + ["readings", "width", "score"] * FLAGS.dead:
            if FLAGS[name].present:
                raise UserError(f"--{name}: is decided by {'--dead' if FLAGS.dead else '--readings'}; leave one out")
    if FLAGS.dead:
        return gates.alive(restored.model.cfg, restored.params)[0]
    if FLAGS.readings:
        return searched(restored.model.cfg, restored.model.compute)
    return Part(layers_of(restored, mesh), FLAGS.width, FLAGS.feed_forward_width, FLAGS.heads)


def searched(cfg: ModelConfig, compute: Compute) -> Part:
    """Returns the part that --readings leads to under --budget, or under --speed.

    Raises:
      UserError: no such readings, or a budget that cannot be met.
    """
    if FLAGS["budget"].present and FLAGS.speed:
        raise UserError("--speed: is another budget than --budget; leave one out")
    readings = sensitivity.load(Path(FLAGS.readings).expanduser(), cfg)[1]
    if FLAGS.speed:
        return fast_enough(cfg, compute, readings)
    if not 0 < FLAGS.budget < 1:
        raise UserError(f"--budget: {FLAGS.budget} is no share between 0 and 1")
    total = sensitivity.numbers_of_layers(cfg)
    found = layer_sizes.search(cfg, readings, layer_sizes.parameters(cfg), FLAGS.budget * total, "--budget")
    print(
        f"layers have {found.cost:,.0f} of {total:,} numbers; readings add up to {found.rise:+.4f} of loss", flush=True
    )
    return dataclasses.replace(found.part, width=FLAGS.width)


def fast_enough(cfg: ModelConfig, compute: Compute, readings: list[sensitivity.Reading]) -> Part:
    """Returns the part that is --speed times as fast, by unit timings; prints what the clock says of it.

    Raises:
      UserError: nothing is that fast.
    """
    if FLAGS.speed <= 1 or FLAGS.width:
        raise UserError("--speed: give how many times as fast, more than 1, and leave --width out")
    load = clock.load_of(cfg, compute, FLAGS.rows, FLAGS.length, FLAGS.tokens)
    heads, widths = layer_sizes.levels(cfg, readings)
    cost = latencies.table(cfg, compute, heads, widths, load).cost(cfg)
    rest = 1 - sum(cost(i, latencies.whole_of(cfg.layer(i))) for i in range(cfg.layers))
    most = 1 / max(rest + layer_sizes.least(cfg, readings, cost), 1e-3)
    off = 1.0  # how much longer things take than the timings of units say: cuts of several parts are not their sum
    for _ in range(ROUNDS):
        try:
            found = layer_sizes.search(cfg, readings, cost, 1 / FLAGS.speed / off - rest, "--speed")
        except UserError:
            raise UserError(
                f"--speed: {FLAGS.speed} is not to be had at {load}; the most is {most / off:.2f}"
            ) from None
        told = (rest + found.cost) * off
        (measured,) = latencies.shares(cfg, [found.part.config(cfg)], compute, load)
        print(
            f"{load}: {told:.3f} of the time predicted, {measured:.3f} measured; "
            f"readings add up to {found.rise:+.4f} of loss",
            flush=True,
        )
        off *= measured / told
        if measured <= CLOSE / FLAGS.speed:
            break
    return found.part


def of_units(deep: ModelConfig, params: Any, known: Mapping[str, Any], name: str, seed: int) -> Scores:
    """Returns what a score says of the units of a model, on the host."""
    leaves = {path: leaf for path, leaf in paths.flatten(params).items() if path in known}
    score = lambda leaves, known: importance.of_units(
        deep, importance.scores(name, leaves, known, jax.random.key(seed))
    )
    return jax.device_get(jax.jit(score)(leaves, known))


def main() -> None:
    """Cuts, and prints what it cost or writes what came out."""
    if not FLAGS.workdir:
        raise UserError("--workdir: name a trained model")
    for name in FLAGS.score:
        importance.of_weights(name, "--score")
    if FLAGS.to and len(FLAGS.score) > 1:
        raise UserError("--to: writes one model; give one --score")
    mesh = meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step)
    cfg = restored.model.cfg
    part = part_of(restored, mesh)
    with by_flags():
        small = part.config(cfg)
    if small == cfg:
        raise UserError("nothing to cut: give --layers, --width, --heads or --feed_forward_width, less than there is")
    (before, inner), (after, left) = parameters_of(cfg), parameters_of(small)
    print(f"{part.describe(cfg)}: {after:,} of {before:,} parameters ({after / before:.3f}); ", end="")
    print(f"without embeddings {left:,} of {inner:,} ({left / inner:.3f})", flush=True)
    deep, params = cfg, restored.params
    if part.layers is not None:
        deep, params = slicing.keep_layers(cfg, params, part.layers)
    matrices = [path for path, names in units.axes(deep).items() if len(names) == 2 and path.startswith("layers/")]
    whole = dataclasses.replace(restored, model=Model(deep, restored.model.compute), params=params)
    rest = dataclasses.replace(part, layers=None)
    if FLAGS.dead:
        names, score = ["(what is read)"], lambda name: gates.alive(cfg, params)[1]
    else:
        known = calibration.seen(whole, mesh, matrices, FLAGS.score)
        names, score = FLAGS.score, lambda name: of_units(deep, params, known, name, FLAGS.seed)
    cut = lambda name: rest.take(deep, params, mesh, score(name))
    if FLAGS.to:
        command = " ".join(["python -m experiments.prune", *sys.argv[1:]])
        size = rewritten.write(FLAGS.workdir, restored, small, cut(names[0]), FLAGS.to, command)
        print(f"wrote step 0 to {FLAGS.to}: {size:,} bytes")
        print(f"next: launch/local.sh -m fastlm.evaluate --workdir {FLAGS.to}")
        return
    changed = (
        ([name], dataclasses.replace(restored, model=Model(small, restored.model.compute), params=cut(name)))
        for name in names
    )
    costs.table(restored, mesh, ["score"], changed, FLAGS.score_batches)


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
