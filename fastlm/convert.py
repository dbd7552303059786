"""Models in and out: Hugging Face folders, hub names and GGUF files to a workdir of fastlm, and back.

    python -m fastlm.convert --from FOLDER_OR_FILE_OR_NAME --to runs/mine
    python -m fastlm.convert --from runs/mine --to FOLDER

A workdir is what fastlm.generate and fastlm.evaluate read and fine-tuning starts from. `--format` says which of
the two to write; by default what the source is not. Beside the checkpoint a workdir keeps the tokenizer's own
files, and so does what is fine-tuned from it, so that they go back unchanged.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from fastlm import command_line, tasks
from fastlm.data import tokenizers
from fastlm.data.tokenizers import marian
from fastlm.errors import UserError
from fastlm.exports import card
from fastlm.models import Compute, ModelConfig, huggingface
from fastlm.models.config import HEADS
from fastlm.parallel import mesh as meshes
from fastlm.training import checkpoints, restore, workdir_files
from fastlm.training import state as states

FROM = flags.DEFINE_string("from", None, "a Hugging Face folder, a name of its hub, a .gguf file, or a fastlm workdir")
TO = flags.DEFINE_string("to", None, "folder to write; must be new or empty")
FORMAT = flags.DEFINE_enum("format", None, ["huggingface", "fastlm"], "what to write; default: what the source is not")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the stored weights; default float32")
HEAD = flags.DEFINE_enum("head", None, list(HEADS), "read with another head than the model's; made anew if not there")
CLASSES = flags.DEFINE_integer("classes", 0, "classes of a new head; 0 keeps the model's", lower_bound=0)
MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "a shorter context than the model's; 0 keeps it", lower_bound=0)
POOLING = flags.DEFINE_enum("pooling", None, ["first", "last", "mean"], "what stands for a text; default: the model's")
REVISION = flags.DEFINE_string("revision", None, "of a model of the hub")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "folder with tokenizer files, if the model comes without")
ARCHITECTURE = flags.DEFINE_string("architecture", None, "class of transformers to write; default: where it came from")
STEP = flags.DEFINE_string("step", "", "checkpoint of a workdir: a number, 'best', or nothing for the newest")
SEED = flags.DEFINE_integer("seed", 0, "of what is made anew", lower_bound=0, upper_bound=2**32 - 1)

# Flags that some directions do not read; the others are for all.
FROM_ELSEWHERE = ("head", "classes", "max_length", "pooling", "tokenizer", "revision", "seed")
FROM_WORKDIR = ("step",)
TO_HUGGINGFACE = ("architecture",)

HOW_TO_RUN = """
## How to run it

```python
from transformers import AutoTokenizer, {class_name}

tokenizer, model = AutoTokenizer.from_pretrained("."), {class_name}.from_pretrained(".")
```
"""

CARRIED = ("compute", "data", "evaluation", "task")  # sections of a run's config that its use needs
# (family, head) -> the task that a model from elsewhere is evaluated and fine-tuned as, if nothing else is said
TASKS = {
    ("decoder", "language_model"): "language_modeling",
    ("encoder_decoder", "language_model"): "sequence_to_sequence",
    ("encoder", "masked_language_model"): "masked_language_modeling",
    ("encoder", "tokens"): "question_answering",  # only of a class that marks spans; others tag tokens
    ("encoder", "sequence"): "classification",
    ("decoder", "sequence"): "classification",
    ("encoder", "none"): "embedding",
    ("decoder", "none"): "embedding",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model between the two worlds.

    Attributes:
      about: of a checkpoint: where the model came from and what it brought.
      config: of a checkpoint: the sections `CARRIED`; {} of a model from elsewhere.
      metrics: of a checkpoint: what it scored.
    """

    cfg: ModelConfig
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    tokenizer_files: dict[str, bytes]
    about: dict[str, Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Reads, writes, and says what it did."""
    source, target = FROM.value, Path(TO.value).expanduser()
    from_workdir = (Path(source).expanduser() / "checkpoints").is_dir()
    kind = FORMAT.value or ("huggingface" if from_workdir else "fastlm")
    check_flags(from_workdir, kind)
    workdir_files.require_free(target)
    model = from_checkpoint(source) if from_workdir else from_huggingface(source)
    (write_huggingface if kind == "huggingface" else write_workdir)(target, model)


def check_flags(from_workdir: bool, kind: str) -> None:
    """Checks that every flag that was set is one that this direction reads.

    Raises:
      UserError: one is not; it would have no effect.
    """
    for read, when, names in (
        (not from_workdir, "--from is no workdir: give it where the model comes in", FROM_ELSEWHERE),
        (from_workdir, "--from is a workdir, with checkpoints: leave it out", FROM_WORKDIR),
        (kind == "huggingface", "a Hugging Face folder is written: leave it out", TO_HUGGINGFACE),
    ):
        idle = [f"--{name}" for name in names if flags.FLAGS[name].present]
        if idle and not read:
            raise UserError(f"{', '.join(idle)}: only has an effect if {when}")


def from_huggingface(source: str) -> Converted:
    """Reads a folder, hub name or GGUF file, and makes anew what a head asked for lacks."""
    imported = huggingface.read(
        source,
        head=HEAD.value,
        classes=CLASSES.value or None,
        revision=REVISION.value,
        max_length=MAX_LENGTH.value or None,
        pooling=POOLING.value,
        allow_missing=("head", "pooler") if HEAD.value or CLASSES.value else (),
    )
    params = huggingface.complete(imported, jax.random.key(SEED.value))
    say(f"read {imported.architecture or 'a body'} from {source}: {count(params):,} parameters")
    for what, names in {"made anew": imported.missing, "left out": imported.unused}.items():
        if names:
            say(f"  {what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}")
    files = imported.tokenizer_files if TOKENIZER.value is None else read_tokenizer_files(TOKENIZER.value)
    about = {
        "architecture": imported.architecture,
        "generation": imported.generation,
        "labels": list(imported.labels),
        "modules": list(imported.modules),
        "chat_template": huggingface.folders.chat_template(files),
        "special_tokens": huggingface.folders.special_tokens(files),
        "tokenizer_note": imported.tokenizer_note,
        "license": imported.license,
    }
    return Converted(imported.cfg, params, None, files, about)


def from_checkpoint(workdir: str) -> Converted:
    """Reads a checkpoint of fastlm with what it kept of its origin."""
    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(workdir, mesh, step=STEP.value)
    about = dict(restored.about.get("huggingface", {}))
    kept = Path(workdir).expanduser() / workdir_files.TOKENIZER
    files = read_tokenizer_files(kept) if kept.is_dir() else {}
    if not files:
        files = huggingface.tokenizer_files(
            restored.tokenizer.to_json(), about.get("chat_template"), **_around_texts(restored.model.cfg)
        )
    task = restored.about["config"].get("task", {})
    if task.get("name") == "sequence_to_sequence":  # it may have been trained to begin otherwise than it came
        kind = tasks.make_kind(task)
        about["generation"] = dict(
            about.get("generation", {}), decoder_start_token_id=kind.start_token(restored.tokenizer)
        )
        about["generation"].pop("forced_bos_token_id", None)
        if kind.forced_first >= 0:
            about["generation"]["forced_bos_token_id"] = kind.forced_first
    about["labels"] = restored.about["config"].get("task", {}).get("labels") or about.get("labels", ())
    ids = {f"{role}_token_id": getattr(restored.tokenizer, role) for role in ("bos", "eos", "pad")}
    about["generation"] = {name: token for name, token in ids.items() if token is not None} | about.get(
        "generation", {}
    )
    say(f"read step {restored.step} of {workdir}: {count(restored.params):,} parameters")
    config = {name: values for name, values in restored.about["config"].items() if name in CARRIED}
    metrics = restored.about["metrics"]
    return Converted(restored.model.cfg, restored.params, restored.tokenizer, files, about, config, metrics)


def _around_texts(cfg: ModelConfig) -> dict[str, bool]:
    """Returns where a tokenizer trained here puts its special token (`tasks.rows`, `tasks.sequence_to_sequence`)."""
    continues = cfg.family == "decoder" and cfg.head == "language_model"
    return {"opens": cfg.family != "encoder_decoder", "closes": not continues}


def write_huggingface(folder: Path, model: Converted) -> None:
    """Writes a folder that transformers loads, with a card."""
    task = model.config.get("task")
    with workdir_files.whole_folder(folder) as aside:
        class_name, written = huggingface.write(
            aside,
            model.cfg,
            tasks.make_kind(task).standalone(model.params) if task else model.params,
            model.tokenizer_files,
            architecture=ARCHITECTURE.value or _origin(model),
            generation=model.about.get("generation"),
            labels=tuple(model.about.get("labels", ())),
            modules=tuple(model.about.get("modules", ())),
            dtype=DTYPE.value,
        )
        source = Path(FROM.value).expanduser()
        told = card.text(
            name=source.absolute().name,
            form="safetensors",
            cfg=model.cfg,
            about={"config": model.config, "huggingface": model.about, "metrics": model.metrics},
            parameters=count(model.params),
            command=" ".join(["python -m fastlm.convert", *sys.argv[1:]]),
            sizes={str(path.relative_to(aside)): path.stat().st_size for path in written},
        )
        told += HOW_TO_RUN.format(class_name=class_name) + card.measured(source)
        workdir_files.write_whole(aside / card.FILE, told)
        size = sum(path.stat().st_size for path in written)
    say(f"wrote {class_name} to {folder}: {len(written)} files, {size:,} bytes, and {card.FILE}")


def _origin(model: Converted) -> str | None:
    """Returns the class that the model came as, if it still holds it."""
    name = model.about.get("architecture") or None
    try:
        return name and huggingface.describe(model.cfg, name)[0]
    except UserError:  # it was changed since; another class may do
        return None


def write_workdir(workdir: Path, model: Converted) -> None:
    """Writes step 0 of a workdir."""
    tokenizer = model.tokenizer or make_tokenizer(model)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.cfg.vocab_size}: they do not belong "
            "together; give the right one with --tokenizer"
        )
    params = model.params
    if DTYPE.value == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    files = checkpoints.Checkpoints(workdir)
    for name, content in model.tokenizer_files.items():
        workdir_files.write_whole(workdir / workdir_files.TOKENIZER / name, content)
    files.save(0, states.of_model(params), _about(model, tokenizer))
    files.close()
    size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    say(f"wrote step 0 to {workdir}: {size:,} bytes")


def make_tokenizer(model: Converted) -> tokenizers.Tokenizer:
    """Makes the tokenizer from the files that the model brought.

    Raises:
      UserError: there are none, or none of a kind that is read.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in model.tokenizer_files.items():
            workdir_files.write_whole(Path(folder) / name, content)
        if "tokenizer.json" in model.tokenizer_files:
            return without_unused_start(tokenizers.make("huggingface", path=folder))
        if set(marian.FILES) <= model.tokenizer_files.keys():
            return tokenizers.make("marian", path=folder)
        for name in ("tokenizer.model", "spiece.model"):
            if name in model.tokenizer_files:
                return tokenizers.make("sentencepiece", path=str(Path(folder) / name))
    wanted = f"no tokenizer.json, tokenizer.model or spiece.model, and not all of {', '.join(marian.FILES)}"
    note = model.about.get("tokenizer_note") or f"{wanted}; only {', '.join(model.tokenizer_files)}"
    raise UserError(
        f"{note}; give a folder with one as --tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) "
        "of transformers makes it)"
    )


def without_unused_start(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns the tokenizer without its start token if it would not put that before a text itself."""
    layout = tokenizer.layout(1)
    if tokenizer.bos is None or (layout is not None and tokenizer.bos in layout.special[0]):
        return tokenizer
    return tokenizers.from_json(json.dumps(json.loads(tokenizer.to_json()) | {"bos": None}))


def read_tokenizer_files(folder: str | Path) -> dict[str, bytes]:
    """Returns the tokenizer files of a folder.

    Raises:
      UserError: there are none.
    """
    files = huggingface.folders.tokenizer_files(Path(folder).expanduser())
    if not files:
        raise UserError(f"{folder}: holds none of {', '.join(huggingface.folders.TOKENIZER_FILES[:4])} ...")
    return files


def _about(model: Converted, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    config = {
        "model": json.loads(model.cfg.to_json()),
        "compute": dataclasses.asdict(Compute()),
        "data": {"sources": [], "length": min(model.cfg.max_length, 1024)},
    } | (model.config or {"task": task_of(model, tokenizer)})
    return {
        "model": config["model"],
        "tokenizer": tokenizer.to_json(),
        "config": config,
        "data": {},
        "metrics": {},
        "versions": checkpoints.versions(),
        "huggingface": model.about,
    }


def task_of(model: Converted, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns the section `task` that goes with family and head; empty where no task here reads them."""
    cfg, generation, labels = model.cfg, model.about["generation"], model.about["labels"]
    name = "regression" if cfg.head == "sequence" and cfg.classes == 1 else TASKS.get((cfg.family, cfg.head))
    tags = name == "question_answering" and not model.about["architecture"].endswith("ForQuestionAnswering")
    if name is None or tags:
        say(f"  no task here asks a model with this '{cfg.head}' head; fine-tune it, or write it back")
        return {}
    section: dict[str, Any] = {"name": name}
    if name == "classification":
        section["labels"] = labels or [f"LABEL_{i}" for i in range(cfg.classes)]
    if name == "regression":
        section["scale"] = 1.0  # the number that the model gives is the answer
    if name == "question_answering":
        section["stride"] = min(32, cfg.max_length // 8)
    if cfg.family == "encoder_decoder":
        section["start"] = generation.get("decoder_start_token_id", -1)
        section["forced_first"] = generation.get("forced_bos_token_id", -1)
        # Models that never learnt to avoid padding would write it; where it is the end token too, they must.
        ends = generation.get("eos_token_id", [])
        pad = generation.get("pad_token_id", tokenizer.pad)
        section["forbidden"] = (
            [pad] if pad not in (tokenizer.eos, *(ends if isinstance(ends, list) else [ends])) else []
        )
    return section


def count(params: Any) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def say(text: str) -> None:
    """Tells what was done."""
    print(text, flush=True)


if __name__ == "__main__":
    for name in ("from", "to"):
        flags.mark_flag_as_required(name)
    command_line.main(main)
