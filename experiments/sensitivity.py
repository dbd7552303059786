"""Which parts of a trained model can be made smaller, and which cannot: the loss as each is pruned or factorised alone.

    launch/local.sh -m experiments.sensitivity --workdir runs/lm_small --to runs/lm_small/sensitivity
    launch/local.sh -m experiments.sensitivity --workdir runs/smollm2 --source csv:rows.csv --ways layer --to runs/why

Writes readings.json, sensitivity.png (a heat map) and sensitivity.html (one page, which needs nothing else) into a
folder. Each reading is kept as it comes: killed, the same command goes on. What each way does: `search.sensitivity`.
The loss is that of --score_batches of the validation split; what decides inside a part is gathered on training data.
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import calibration
from fastlm import command_line
from fastlm.errors import UserError, nearest
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.reports import sensitivity as report
from fastlm.search import sensitivity
from fastlm.search.sensitivity import Reading
from fastlm.training import quality, restore, workdir_files

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    calibration.define_model()
    flags.DEFINE_list("ways", list(sensitivity.WAYS), f"of {', '.join(sensitivity.WAYS)}")
    flags.DEFINE_list("levels", ["0.5"], "shares of a part that are gone")
    calibration.define_flags()
    flags.DEFINE_string("score_split", "validation", "whose loss is read")
    flags.DEFINE_integer("score_batches", 8, f"batches of {calibration.ROWS} rows of it", lower_bound=2)
    flags.DEFINE_string("to", None, "folder to write, or to go on in")


def settings(step: int) -> dict[str, Any]:
    """Returns what readings of one file have in common."""
    return {
        "workdir": FLAGS.workdir,
        "step": step,
        "source": list(FLAGS.source),
        "split": FLAGS.split,
        "batches": FLAGS.batches,
        "score_split": FLAGS.score_split,
        "score_batches": FLAGS.score_batches,
    }


def known_readings(path: Path, cfg: ModelConfig, wanted: dict[str, Any]) -> list[Reading]:
    """Returns the readings there are.

    Raises:
      UserError: they are of something else.
    """
    if not path.exists():
        return []
    before, rows = sensitivity.load(path, cfg)
    other = [name for name in wanted if before.get(name) != wanted[name]]
    if other:
        raise UserError(f"{path}: holds readings with another {', '.join(other)}; give another folder with --to")
    return rows


def main() -> None:
    """Reads what is not known yet, and draws all of it."""
    if not FLAGS.workdir or not FLAGS.to:
        raise UserError("--workdir, --to: name a trained model and the folder to write")
    for name in FLAGS.ways:
        if name not in sensitivity.WAYS:
            known = sensitivity.WAYS
            raise UserError(f"--ways: no '{name}'{nearest(name, known)}; one of: {', '.join(known)}")
    levels = [share for share in calibration.shares(FLAGS.levels, "--levels") if 0 < share < 1]
    if not levels:
        raise UserError("--levels: give shares between 0 and 1")
    mesh = meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh, step=FLAGS.step)
    cfg, compute = restored.model.cfg, restored.model.compute
    if cfg.formats:
        raise UserError(f"{FLAGS.workdir}: has factors; read the model that they were made of")
    folder = Path(FLAGS.to).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    made = settings(restored.step)
    rows = known_readings(folder / sensitivity.FILE, cfg, made)
    done = {(row.part, row.way, row.level) for row in rows}
    wanted = [one for one in sensitivity.asked(cfg, FLAGS.ways, levels) if one not in done]
    if wanted:
        seen = calibration.evidence_for(restored, mesh, sensitivity.matrices(cfg), sensitivity.NEEDS)
        asked = quality.Asked(
            tuple(FLAGS.source), FLAGS.score_split, batch_size=calibration.ROWS, batches=FLAGS.score_batches
        )
        batches = list(quality.batches(restored, mesh, asked))
        if len(batches) < 2:
            raise UserError("--score_split: fewer than two batches there; name another --source or --score_split")
        kind = restored.kind()
        make_task = lambda cfg: kind.make(Model(cfg, compute), restored.tokenizer)
        for row in sensitivity.readings(cfg, make_task, restored.params, seen, batches, wanted):
            rows.append(row)
            workdir_files.write_whole(
                folder / sensitivity.FILE, sensitivity.as_text(cfg, made, rows)
            )  # whole at any time
            print(
                f"{len(rows)}/{len(done) + len(wanted)} {row.part} {row.way} -{row.level:.0%}: "
                f"loss {row.rise:+.4f} ± {row.error:.4f}",
                flush=True,
            )
    title = f"What can be made smaller in {Path(FLAGS.workdir).absolute().name}"
    about = {"title": title, "checkpoint": f"step {restored.step}", "loss on": f"{FLAGS.score_split} split"}
    files = report.write(rows, about, folder)
    print(f"wrote {sensitivity.FILE}, {', '.join(path.name for path in files)} to {folder}")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
