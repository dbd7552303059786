"""Writes what a teacher says of every token of a student's training data: a few ids with weights, kept on disk.

    launch/local.sh -m experiments.teacher_targets --config configs/distill/language_model.py --folder runs/targets
    launch/local.sh -m experiments.distill --config configs/distill/language_model.py \\
        --config.distilled.cache=runs/targets --config.distilled.terms="(('cross_entropy', 0.3), ('cached_kl', 0.7))"

The student's config decides which batches there will be, and in which order; its first teacher reads them.
--method "sampled(draws=50)" is unbiased, "top_k(k=50)" is not (see `ops.sparse_targets`). A stopped run goes on by the
same command; --writers 4 --writer 0 ... 3 share the work between processes, on whatever machines see the folder. The
student then needs no teacher: --config.distilled.teachers="()" takes whose the targets are.
"""

import jax
from absl import flags

from fastlm import command_line, configuration
from fastlm.compress import cached, distill, teachers
from fastlm.data import targets
from fastlm.errors import UserError
from fastlm.ops import sparse_targets
from fastlm.tasks.scoring import to_device
from fastlm.training import build

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("config", None, "the student's")
    flags.DEFINE_string("folder", None, "where the targets go")
    flags.DEFINE_string("method", "sampled(draws=50)", "how a distribution is kept: sampled(...) or top_k(...)")
    flags.DEFINE_integer("steps", 0, "batches to write; 0 for as many as the config trains", lower_bound=0)
    flags.DEFINE_integer("writers", 1, "processes that share the files", lower_bound=1)
    flags.DEFINE_integer("writer", 0, "this one among them", lower_bound=0)
    flags.DEFINE_integer("targets_seed", 0, "of the draws", lower_bound=0)
    flags.mark_flags_as_required(["config", "folder"])


def main() -> None:
    """Reads the flags, writes, says what it came to."""
    config = command_line.load_config(FLAGS.config, command_line.overrides())
    options = configuration.make(distill.Distilled, distill.NAME, config[distill.NAME])
    experiment = build.build(config | {"wrappers": ()}, FLAGS.folder)
    setting = experiment.setting()
    if len(options.teachers) != 1:
        raise UserError(f"config.distilled.teachers: targets are of one teacher, got {len(options.teachers)}")
    cached.check_task(setting, "--config")
    method = sparse_targets.make(FLAGS.method, "--method")
    jax.set_mesh(setting.mesh)
    teacher = teachers.load(setting, options.teachers[0], options.step, options.dtype, options.weights)
    batches = experiment.train_batches()
    vocab_size = min(teacher.cfg.vocab_size, setting.model.cfg.vocab_size)
    key = targets.Key(
        teacher.fingerprint,
        setting.tokenizer.fingerprint,
        vocab_size,
        FLAGS.method,
        batches.identity,
        FLAGS.targets_seed,
    )
    teach = cached.teaching(teacher, method, FLAGS.targets_seed, vocab_size)
    targets.write(
        batches,
        lambda batch: teach(to_device(batch, setting.mesh)),
        FLAGS.folder,
        key,
        steps=FLAGS.steps or setting.steps,
        writer_index=FLAGS.writer,
        writer_count=FLAGS.writers,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
