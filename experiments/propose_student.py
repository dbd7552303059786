"""Which students a trained model could have: sizes under a budget, and the words that train them.

    launch/local.sh -m experiments.propose_student --workdir runs/lm_reference --parameters 0.35
    launch/local.sh -m experiments.propose_student --workdir runs/lm_reference --parameters 0.5 --speed 2

Prints a table, the best first (see `fastlm.search.students`), and for each student the arguments with which any config
trains it from the teacher's own weights; --parameters is a share of all of them, embeddings counted. Without --speed it
takes seconds; with it, students are timed beside the teacher, some seconds each, on a machine that should do nothing
else.
"""

import json
import shlex
from collections.abc import Sequence

from absl import flags

from fastlm import command_line, configuration
from fastlm.errors import UserError
from fastlm.models import Compute, ModelConfig
from fastlm.search import students
from fastlm.search.clock import clock
from fastlm.search.shapes import parameters_of
from fastlm.search.students import Student
from fastlm.training.checkpoints import Checkpoints

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("workdir", None, "the teacher: a run of fastlm.train, or what fastlm.convert wrote")
    flags.DEFINE_string("step", "", "checkpoint of it: a number, 'best', or nothing for the newest")
    flags.DEFINE_float("parameters", None, "the most a student may have: up to 1 a share, above 1 a number")
    flags.DEFINE_float("speed", None, "how many times as fast as the teacher it has to be, measured")
    flags.DEFINE_integer("count", 6, "the most students shown, and measured at a time", lower_bound=1)
    flags.DEFINE_integer("rows", 1, "rows at a time, where speed is measured", lower_bound=1)
    flags.DEFINE_integer("length", 256, "tokens of a row, of which FLOPs and speed are", lower_bound=1)
    flags.DEFINE_integer("new", 32, "tokens that are written behind them", lower_bound=8)


def table(teacher: ModelConfig, proposed: Sequence[Student]) -> str:
    """Returns the students as Markdown, the teacher first."""
    total, inner = parameters_of(teacher)
    timed = any(one.speed is not None for one in proposed)
    lines = [
        "| | layers | width | heads (kv) | feed-forward | parameters | share | without embeddings | FLOPs a token |"
        + (" speed |" if timed else ""),
        "|---|" + "---:|" * (9 if timed else 8),
        _row("teacher", teacher, [f"{total:,}", "1", f"{inner:,}", "1"] + (["1"] if timed else [])),
    ]
    for number, one in enumerate(proposed, 1):
        values = [f"{one.parameters:,}", f"{one.share:.3f}", f"{one.inner_share:.3f}", f"{one.work:.3f}"]
        lines.append(_row(str(number), one.cfg, values + ([f"{one.speed:.2f}x"] if timed else [])))
    return "\n".join(lines)


def _row(name: str, cfg: ModelConfig, values: Sequence[str]) -> str:
    of_each = lambda key: "-".join(map(str, sorted({getattr(cfg.layer(i), key) for i in range(cfg.total_layers)})))
    depth = f"{cfg.encoder_layers} + {cfg.layers}" if cfg.encoder_layers else str(cfg.layers)
    heads = f"{of_each('heads')} ({of_each('kv_heads')})"
    return f"| {' | '.join([name, depth, str(cfg.width), heads, of_each('feed_forward_width'), *values])} |"


def main() -> None:
    """Reads what the teacher is, proposes, prints."""
    if not FLAGS.workdir:
        raise UserError("--workdir: name the teacher")
    files = Checkpoints(FLAGS.workdir, read_only=True)
    about = files.about(files.resolve(FLAGS.step))
    teacher = ModelConfig.from_json(json.dumps(about["model"])).in_use()
    compute = configuration.make(Compute, "compute", about["config"].get("compute", {}))
    length = min(FLAGS.length, teacher.max_length)
    proposed = students.propose(
        teacher,
        parameters=FLAGS.parameters,
        speed=FLAGS.speed,
        length=length,
        count=FLAGS.count,
        clock=clock(compute, rows=FLAGS.rows, length=length, tokens=FLAGS.new),
    )
    print(table(teacher, proposed))
    for number, one in enumerate(proposed, 1):
        words = students.overrides(teacher, one, FLAGS.workdir)
        words += [f"--config.init.step={FLAGS.step}"] if FLAGS.step else []
        print(f"\n{number}: {shlex.join(words)}")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
