"""How much farther from its teacher a student is behind its own words than behind those of the data.

    launch/local.sh -m experiments.exposure_gap --workdir runs/student --teacher runs/translate_small

A student that learned on the data's words alone has never seen what it writes itself: its errors add up (exposure
bias). For the rows of a split, the student draws what follows each row's beginning, and both texts are read by student
and teacher: the divergences at each place, in nats, behind the data's words and behind the student's own, and the
excess, KL(student | teacher) behind its own words over that behind the data's, less 1 (Arora et al., arXiv
2204.01171, with the data's words in the place of the teacher's). Of a language model's rows both count what is behind
the first --prompt tokens; what is drawn stops where the student ends a text, and goes on over the borders of documents,
so take rows of one document (a source of long texts) for a fair comparison. The same --seed draws the same texts.
Left out: several draws for a row; what people make of the texts.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from fastlm import command_line
from fastlm.compress import Setting, on_policy
from fastlm.compress.distill import PREFIX, Distilled
from fastlm.parallel import mesh as meshes
from fastlm.tasks.scoring import to_device
from fastlm.tasks.task import Batch, Task
from fastlm.training import initial, quality, restore

FLAGS = flags.FLAGS
DATA, OWN = "the data's words", "its own words"
TERMS = {"reverse_kl": "KL(student | teacher)", "forward_kl": "KL(teacher | student)"}


def compared(setting: Setting, teacher: str, step: str, prompt: int) -> tuple[Task, int]:
    """Returns the student's task as one that writes and is compared with a teacher, and the tokens it starts from.

    Raises:
      UserError: a task or model that writes nothing, a teacher that cannot teach it.
    """
    terms = tuple((name, 1.0) for name in TERMS)
    how = {"share": 1.0, "prompt": prompt}
    wrapper = Distilled(teachers=(teacher,), step=step, terms=terms, on_policy=how)
    plain = setting.kind.make(setting.model, setting.tokenizer)
    writer = on_policy.make(on_policy.OnPolicy(**how), setting, "--workdir: on_policy")
    return wrapper(plain, setting), writer.prompt


def sums_of(task: Task, params: Any, batches: Iterable[Batch], prompt: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns the summed divergences by what they stand behind; "count" is of predictions.

    Args:
      batches: on the device; each is its own beginning, no state is carried on.
    """
    weights = {"model": params}
    write = jax.jit(task.prepare)
    read: Callable[..., Any] = jax.jit(functools.partial(_sums, task))
    found: dict[str, dict[str, float]] = {DATA: {}, OWN: {}}
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        known = _behind(batch, prompt) | {on_policy.WRITTEN: jnp.zeros(batch["tokens"].shape[0])}
        for name, one in ((DATA, known), (OWN, write(weights, task.constants, batch, 0, key))):
            for term, value in read(weights, task.constants, one).items():
                found[name][term] = found[name].get(term, 0.0) + float(value)
    return found


def _sums(task: Task, weights: Any, constants: Any, batch: Batch) -> dict[str, jax.Array]:
    _, _, (_, aux) = task.loss(weights, constants, task.carry(batch["tokens"].shape[0]), batch, 0, None)
    sums = aux["sums"]
    return {name: sums[f"{PREFIX}term/{name}"] for name in TERMS} | {"count": sums[f"{PREFIX}count"]}


def _behind(batch: Batch, prompt: int) -> Batch:
    """Leaves out what a language model's rows begin with; other tasks count only what is written anyway."""
    if "loss_mask" not in batch:
        return batch
    places = jnp.arange(batch["loss_mask"].shape[1]) >= prompt - 1
    return batch | {"loss_mask": batch["loss_mask"] * places}


def table(sums: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the comparison as Markdown."""
    mean = lambda name, term: sums[name][term] / max(sums[name]["count"], 1.0)
    lines = [f"| behind | {' | '.join(TERMS.values())} | predictions |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {' | '.join(f'{mean(name, term):.4f}' for term in TERMS)} | {sums[name]['count']:.0f} |"
        for name in (DATA, OWN)
    ]
    data = mean(DATA, "reverse_kl")
    excess = mean(OWN, "reverse_kl") / data - 1 if data > 0 else 0.0
    return "\n".join([*lines, f"excess: {excess:+.1%}"])


def main() -> None:
    """Restores the student, has it write, compares."""
    mesh = meshes.share_weights(1)
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step or None)
    asked = quality.Asked(split=FLAGS.split)
    data, evaluation, split = quality.data_of(restored, asked)
    kind = restored.kind()
    setting = Setting(
        restored.model,
        kind,
        restored.tokenizer,
        mesh,
        data.length,
        1,
        lambda workdir, step: initial.start(initial.Init(workdir, step)),
    )
    task, prompt = compared(setting, FLAGS.teacher, FLAGS.teacher_step, FLAGS.prompt)
    evaluation = dataclasses.replace(evaluation, batch_size=FLAGS.batch_size, overlap=0)
    batches = kind.eval_batches(restored.model.cfg, restored.tokenizer, data, evaluation, split, FLAGS.batches)
    sums = sums_of(task, restored.params, (to_device(batch, mesh) for batch in batches), prompt, FLAGS.seed)
    print(table(sums))
    print(json.dumps({"sums": sums, "split": split, "step": restored.step}))


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("workdir", None, "the student's")
    flags.DEFINE_string("step", "", "checkpoint of it: a number, 'best', or nothing for the newest")
    flags.DEFINE_string("teacher", None, "workdir of the teacher")
    flags.DEFINE_string("teacher_step", "", "checkpoint of that")
    flags.DEFINE_string("split", "", "split whose rows are begun; default the final one of the student's config")
    flags.DEFINE_integer("batches", 16, "of rows", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "rows at a time", lower_bound=1)
    flags.DEFINE_integer("prompt", 0, "tokens of a language model's rows that are kept; 0 for half", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0)
    flags.mark_flags_as_required(["workdir", "teacher"])


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
