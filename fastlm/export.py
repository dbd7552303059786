"""Takes a trained model to another runtime.

    python -m fastlm.export --workdir runs/lm_small --format stablehlo --to exported

`stablehlo` writes the model's functions for any XLA runtime (cpu, cuda, tpu) beside its weights; nothing of fastlm is
needed to run them, and the card in the folder shows how. For Hugging Face (safetensors) see fastlm.convert. A folder
appears whole or not at all.
"""

import shutil
import sys
from pathlib import Path

import jax
from absl import flags

from fastlm import command_line
from fastlm.errors import UserError
from fastlm.exports import card, stablehlo
from fastlm.models import Compute, Model
from fastlm.parallel import mesh as meshes
from fastlm.training import restore, workdir_files

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
FORMAT = flags.DEFINE_enum("format", None, ["stablehlo"], "what to write")
TO = flags.DEFINE_string("to", None, "folder to write; must be new or empty")
LENGTH = flags.DEFINE_integer("length", 0, "tokens of every row; 0 leaves that open where it can be", lower_bound=0)
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "compute type of the programs")


def main() -> None:
    """Restores, writes aside, renames."""
    target = Path(TO.value).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to: {target} exists and is not an empty folder; name another one")
    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(WORKDIR.value, mesh, step=STEP.value, average=AVERAGE.value)
    cfg = restored.model.cfg
    if LENGTH.value > cfg.max_length:
        raise UserError(f"--length: {LENGTH.value} is more than the model's context of {cfg.max_length} tokens")
    model = Model(cfg, Compute(dtype=DTYPE.value, attention_form="plain"))
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        files = stablehlo.write(aside, model, restored.params, LENGTH.value or None)
        workdir_files.carry_tokenizer(Path(WORKDIR.value), aside)
        (aside / "tokenizer.fastlm.json").write_text(restored.tokenizer.to_json())
        told = card.text(
            name=Path(WORKDIR.value).absolute().name,
            form=FORMAT.value,
            cfg=cfg,
            about=restored.about,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(restored.params)),
            command=" ".join(["python -m fastlm.export", *sys.argv[1:]]),
            files=files,
        )
        (aside / "README.md").write_text(told + stablehlo.HOW_TO_RUN + card.measured(Path(WORKDIR.value)))
        if target.exists():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"wrote {', '.join([*files, 'README.md'])} to {target}: {size:,} bytes")


if __name__ == "__main__":
    for name in ("workdir", "format", "to"):
        flags.mark_flag_as_required(name)
    command_line.main(main)
