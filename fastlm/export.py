"""Takes a trained model to another runtime.

    python -m fastlm.export --workdir runs/lm_small --format onnx --weights int4 --to exported
    python -m fastlm.export --workdir runs/lm_small --format stablehlo --to exported

`onnx` writes the model's functions for ONNX Runtime, with weights whole, in eight bits or in four. `stablehlo` writes
them for any XLA runtime (cpu, cuda, tpu). Nothing of fastlm is needed to run either, and the card in the folder shows
how; fastlm.generate, fastlm.evaluate and fastlm.measure take both, with --runtime onnx or stablehlo. `gguf` writes
decoders of Llama's kind, with their tokenizer, for llama.cpp. For Hugging Face (safetensors) see fastlm.convert. A
folder appears whole or not at all.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from absl import flags

from fastlm import command_line
from fastlm.errors import UserError
from fastlm.exports import card, exported_model, gguf, onnx, onnx_calibration, stablehlo
from fastlm.models import Compute, Model, huggingface
from fastlm.parallel import mesh as meshes
from fastlm.training import quality, restore, workdir_files

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
FORMAT = flags.DEFINE_enum("format", None, ["gguf", "onnx", "stablehlo"], "what to write")
TO = flags.DEFINE_string("to", None, "folder to write; must be new or empty")
LENGTH = flags.DEFINE_integer("length", 0, "tokens of every row; 0 leaves that open where it can be", lower_bound=0)
WEIGHTS = flags.DEFINE_string("weights", "", "how they are kept; onnx: float32, int8, ...; gguf: float16, q8_0, q4_0")
SOURCE = flags.DEFINE_multi_string(
    "source", [], "with int8_static: what inputs are measured on; default the training's"
)
SPLIT = flags.DEFINE_string("split", "train", "with int8_static: split of it")
CALIBRATION_BATCHES = flags.DEFINE_integer("calibration_batches", 8, "with int8_static: of 8 rows", lower_bound=1)
CALIBRATION_LENGTH = flags.DEFINE_integer("calibration_length", 256, "tokens of such a row", lower_bound=1)
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "compute type of the programs")

HOW_TO_RUN = {"gguf": gguf.HOW_TO_RUN, "onnx": onnx.HOW_TO_RUN, "stablehlo": stablehlo.HOW_TO_RUN}
KEPT = {"gguf": tuple(gguf.FORMATS), "onnx": onnx.WEIGHTS, "stablehlo": ("float32",)}  # the first is the default


def main() -> None:
    """Restores, writes aside, renames."""
    weights = kept_as()
    target = Path(TO.value).expanduser()
    workdir_files.require_free(target)
    mesh = meshes.alone()
    jax.set_mesh(mesh)
    restored = restore.restore(WORKDIR.value, mesh, step=STEP.value, average=AVERAGE.value)
    cfg = restored.model.cfg
    if LENGTH.value > cfg.max_length:
        raise UserError(f"--length: {LENGTH.value} is more than the model's context of {cfg.max_length} tokens")
    model = Model(cfg, Compute(dtype=DTYPE.value, attention_form="plain"))
    with workdir_files.whole_folder(target) as aside:
        files = write(aside, model, restored, weights)
        workdir_files.carry_tokenizer(Path(WORKDIR.value), aside)
        (aside / exported_model.TOKENIZER).write_text(restored.tokenizer.to_json())
        told = card.text(
            name=Path(WORKDIR.value).absolute().name,
            form=FORMAT.value,
            cfg=cfg,
            about=restored.about,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(restored.params)),
            command=" ".join(["python -m fastlm.export", *sys.argv[1:]]),
            sizes={name: (aside / name).stat().st_size for name in files},
        )
        told += HOW_TO_RUN[FORMAT.value] + card.measured(Path(WORKDIR.value))
        (aside / card.FILE).write_text(told)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"wrote {', '.join([*files, card.FILE])} to {target}: {size:,} bytes")


def kept_as() -> str:
    """Returns --weights, or what is usual.

    Raises:
      UserError: the format has no such weights, lengths or types.
    """
    form, weights = FORMAT.value, WEIGHTS.value or KEPT[FORMAT.value][0]
    if weights not in KEPT[form]:
        raise UserError(f"--weights: --format {form} keeps {', '.join(KEPT[form])}, not '{weights}'")
    if form != "stablehlo" and DTYPE.value != "float32":
        raise UserError(f"--dtype: {DTYPE.value} goes with --format stablehlo; for fewer bytes give --weights")
    for name in ("source", "split", "calibration_batches", "calibration_length"):
        if flags.FLAGS[name].present and weights != onnx.STATIC:
            raise UserError(f"--{name}: goes with --weights {onnx.STATIC}; leave it out")
    if form == "gguf" and LENGTH.value:
        raise UserError("--length: a gguf file has no programs, and so no length; leave it out")
    return weights


def write(folder: Path, model: Model, restored: restore.Restored, weights: str) -> list[str]:
    """Writes the model in the format that is asked for; returns the names of the files."""
    length = LENGTH.value or None
    if FORMAT.value == "gguf":
        files, name = tokenizer_files(restored), Path(WORKDIR.value).absolute().name
        named = restored.about.get("huggingface", {}).get("license", "")
        return gguf.write(folder, model.cfg, restored.params, files, weights, name, named)
    if FORMAT.value == "stablehlo":
        files = stablehlo.write(folder, model, restored.params, length)
    else:
        files = onnx.write(folder, model, restored.params, length, weights, ranges_of(model, restored, weights))
    about = {name: value for name, value in restored.about.items() if name != "tokenizer"} | {"step": restored.step}
    (folder / exported_model.ABOUT).write_text(json.dumps(about))
    return [*files, exported_model.ABOUT]


def ranges_of(model: Model, restored: restore.Restored, weights: str) -> onnx_calibration.Ranges | None:
    """Returns the ranges of inputs, for weights that need them."""
    if weights != onnx.STATIC:
        return None
    asked = quality.Asked(SOURCE.value, SPLIT.value, batch_size=8, batches=CALIBRATION_BATCHES.value)
    given = [CALIBRATION_LENGTH.value, *filter(None, [LENGTH.value]), quality.data_of(restored, asked)[0].length]
    asked = dataclasses.replace(asked, length=min(given))
    return onnx_calibration.ranges(restored, model, LENGTH.value or None, meshes.alone(), asked)


def tokenizer_files(restored: restore.Restored) -> dict[str, bytes]:
    """Returns the files of the model's tokenizer, those it came with or those of one that was trained here."""
    files = huggingface.folders.tokenizer_files(Path(WORKDIR.value).expanduser() / workdir_files.TOKENIZER)
    template = restored.about.get("huggingface", {}).get("chat_template")
    return files or huggingface.tokenizer_files(restored.tokenizer.to_json(), template)


if __name__ == "__main__":
    for name in ("workdir", "format", "to"):
        flags.mark_flag_as_required(name)
    command_line.main(main)
