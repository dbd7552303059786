"""Gives a trained model another attention: each block learns from its own, then the whole from the whole.

    launch/local.sh -m experiments.linearize --config configs/distill/linearize.py --blocks schedule.peak=0.02
    launch/local.sh -m experiments.linearize --config configs/distill/linearize.py --lengths 2048,8192 \\
        --config.model.attention="('local(window=64)', 'local(window=64)', 'local(window=64)', 'full')"

The config is that of the second stage, an ordinary distillation whose student starts from its teacher's weights
(config.init.source) with other kinds of attention: what fits is kept, what the new kinds need is made anew. Before it,
in FOLDER/blocks, the same student is trained with the one term "blocks" (`fastlm.compress.blockwise`): every converted
layer by itself, on what the teacher's layer reads. Then, in FOLDER/end_to_end, the config as it is, from these weights.
Overrides (--config.training.steps=300) go to both stages, --blocks training.steps=100 to the first alone: what is new
wants a higher rate there than trained weights do later. --train block has it train whole blocks instead of their
attention. Both are trainings that resume: the same command goes on. Thin matrices in the second stage, as in LoLCATs:
--config.wrappers="('lora','distilled')" --blocks "wrappers=('distilled',)".
The table has scores on the test split and parameters; with --lengths also what teacher and student take to read a row
of so many tokens: by turns, medians, on a machine that should do nothing else.
Papers: LoLCATs (arXiv 2410.10254), T2R (2103.13076), The Mamba in the Llama (2408.15237), MOHAWK (2408.10189).
Left out: the same student without the first stage; `fastlm.train` with the same config trains that.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import distill as distilling
from experiments.distill import Score
from fastlm import command_line
from fastlm.compress import blockwise, distill
from fastlm.decoding import inputs
from fastlm.errors import UserError
from fastlm.measurement import runtimes, workers
from fastlm.models import Model, ModelConfig, abstract
from fastlm.parallel import mesh as meshes
from fastlm.search.shapes import parameters_of
from fastlm.training import build, loop, restore, workdir_files
from fastlm.training.initial import Init

FLAGS = flags.FLAGS
BLOCKS, END_TO_END = "blocks", "end_to_end"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training: its name, which is that of its workdir, and its config."""

    name: str
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.config["training"]["steps"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in the table; `seconds` that it takes to read rows of so many tokens, as far as that was timed."""

    name: str
    score: Score
    steps: str
    cfg: ModelConfig
    seconds: Mapping[int, float] = dataclasses.field(default_factory=dict)


def stages(config: str, overrides: Sequence[str], first: Sequence[str], train: str, folder: Path) -> list[Stage]:
    """Returns both trainings.

    Args:
      overrides: of both; first: of the first alone.
      train: what of a converted layer learns in the first, see `blockwise.Blocks`.

    Raises:
      UserError: a config that distils nothing, whose student does not start from its teacher, or is not scored.
    """
    whole = command_line.load_config(config, list(overrides))
    own = command_line.load_config(config, [*overrides, *first])
    section, init = whole[distill.NAME], whole["init"]
    if not all(distill.NAME in values["wrappers"] for values in (whole, own)):
        raise UserError(f"config.wrappers: has no '{distill.NAME}', so nothing would be learned of the teacher; add it")
    if [init["source"]] != list(section["teachers"]) or init["step"] != section["step"]:
        raise UserError(
            f"config.init.source: a converted model starts from its teacher, but this one from '{init['source']}' "
            f"{init['step']} with the teachers {section['teachers']} {section['step']}; name one workdir in both"
        )
    if not whole["evaluation"]["final_split"]:
        raise UserError("config.evaluation.final_split: the table needs scores; name a split")
    for name in ("model", "init", "tokenizer"):
        if own[name] != whole[name]:
            raise UserError(f"--blocks: changes config.{name}, but both stages train one student; say it for both")
    terms = ((f"{blockwise.BLOCKS}(train='{train}')", 1.0),)
    alone = section | {"terms": terms, "cache": "", "on_policy": {}}
    begun = dataclasses.asdict(Init()) | {"step": str(own["training"]["steps"])}
    second = whole | {"init": begun | {"source": str(folder / BLOCKS)}}
    return [Stage(BLOCKS, own | {distill.NAME: alone}), Stage(END_TO_END, second)]


def check(planned: Sequence[Stage], folder: Path, lengths: Sequence[int]) -> None:
    """Checks everything before the first stage begins; the second as if it began from the teacher.

    Raises:
      UserError: a stage cannot be built, rows of such a length cannot be read, or the folder holds a second stage that
        began from another first one.
    """
    first, second = planned
    build.build(first.config, folder / first.name)
    experiment = build.build(second.config | {"init": first.config["init"]}, folder / second.name)
    if lengths:
        for model in (experiment.model, trained(first.config["init"]).model):
            reading(model, max(lengths))
    known = folder / second.name / "config.json"
    begun = json.loads(known.read_text())["init"] if known.is_file() else second.config["init"]
    if begun != second.config["init"]:
        raise UserError(
            f"{folder / second.name} began from step {begun['step']} of {begun['source']}, not from step "
            f"{second.config['init']['step']} of {second.config['init']['source']}; name another --folder"
        )


def trained(init: Mapping[str, Any]) -> restore.Restored:
    """Returns the model that a section `init` names."""
    return restore.restore(init["source"], meshes.share_weights(1), step=init["step"] or None)


def convert(
    config: str,
    overrides: Sequence[str] = (),
    first: Sequence[str] = (),
    train: str = "attention",
    folder: Path = Path("runs/linearized"),
    lengths: Sequence[int] = (),
) -> str:
    """Trains what is missing and returns the table, also in results.md; "" where a training was asked to stop.

    Raises:
      UserError: as `stages` and `check`, or what a training says.
    """
    planned = stages(config, overrides, first, train, folder)
    check(planned, folder, lengths)
    teacher = planned[0].config["init"]
    rows = [Row("teacher", distilling.score_of_teacher(config, overrides), "", trained(teacher).model.cfg)]
    steps = []
    for stage in planned:
        experiment = build.build(stage.config, folder / stage.name)
        print(f"--- {stage.name}: {stage.steps} steps", *experiment.notes, sep="\n", flush=True)
        result = loop.run(experiment, say=lambda text: print(text, flush=True))
        if result.status != "finished":
            return ""
        steps.append(str(stage.steps))
        name = "student, block by block" if stage.name == BLOCKS else "student, then end to end"
        rows.append(Row(name, Score(result.metrics, []), " + ".join(steps), experiment.model.cfg))
    if lengths:
        seconds = reading_seconds([trained(teacher), trained({"source": folder / END_TO_END, "step": ""})], lengths)
        rows = [dataclasses.replace(row, seconds=taken) for row, taken in zip(rows, (seconds[0], {}, seconds[1]))]
    text = table(rows)
    workdir_files.write_whole(folder / "results.md", text + "\n")
    return text


def reading_seconds(models: Sequence[restore.Restored], lengths: Sequence[int], turns: int = 5) -> list[dict]:
    """Returns the median seconds in which each model reads one row of each length, timed by turns."""
    found: list[dict] = [{} for _ in models]
    for length in lengths:
        timers = {}
        for place, one in enumerate(models):
            model, start = reading(one.model, length), None
            if model.cfg.family == "encoder_decoder":
                start = one.kind().writing(model.cfg, one.tokenizer).start
            read = runtimes.Jitted(model, one.params, start).read
            timers[str(place)] = lambda read=read: {"seconds": read(1, length)}  # noqa: B023
            for _ in range(2):  # compile, and let the allocator settle
                timers[str(place)]()
        for place, taken in workers.take_turns(timers, turns).items():
            found[int(place)][length] = statistics.median(turn["seconds"] for turn in taken)
    return found


def reading(model: Model, length: int) -> Model:
    """Returns the model with room for a row of so many tokens and one more, whatever it has learned to read.

    Raises:
      UserError: its weights end before that, or a kind of attention that reads no prompt.
    """
    cfg = dataclasses.replace(model.cfg, max_length=max(model.cfg.max_length, length + 1))
    if abstract(cfg)[0] != abstract(model.cfg)[0]:
        raise UserError(
            f"--lengths: the weights of this model end at {model.cfg.max_length} tokens (config.model.positions "
            f"'{cfg.positions}'), so no row of {length} can be read; give shorter ones"
        )
    if cfg.head == "language_model" and cfg.family != "encoder":
        inputs.check_kinds(cfg)
    return Model(cfg, model.compute)


def table(rows: Sequence[Row]) -> str:
    """Returns models and their scores as Markdown, the teacher first; speeds as times of its own."""
    metric = distilling.metric_of([row.score for row in rows])
    first, lengths = rows[0], list(rows[0].seconds)
    lines = [
        f"| | {metric} | of the teacher's | steps | parameters |" + "".join(f" read {n:,} |" for n in lengths),
        "|---|---:|---:|---:|---:|" + "---:|" * len(lengths),
    ]
    for row in rows:
        value, error = row.score.metrics[metric], row.score.metrics.get(f"{metric}_error")
        cells = [
            f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else ""),
            f"{value / first.score.metrics[metric]:.3f}",
            row.steps,
            f"{parameters_of(row.cfg)[0]:,}",
        ]
        timed = [(row.seconds[n], first.seconds[n] / row.seconds[n]) if row.seconds else None for n in lengths]
        cells += [f"{1e3 * one[0]:.1f} ms ({one[1]:.2f}x)" if one else "" for one in timed]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lengths_of(texts: Sequence[str]) -> list[int]:
    """Returns --lengths.

    Raises:
      UserError: no positive whole numbers.
    """
    if not all(text.isdecimal() and int(text) for text in texts):
        raise UserError(f"--lengths: needs numbers of tokens like 2048,8192, got '{','.join(texts)}'")
    return [int(text) for text in texts]


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("config", None, "Python file with get_config(); override with --config.section.key=value")
    flags.DEFINE_string("folder", "", "where both workdirs and results.md lie; default runs/converted/<name of config>")
    flags.DEFINE_multi_string("blocks", [], "override of the first stage alone, as training.steps=100; may be repeated")
    flags.DEFINE_enum("train", "attention", blockwise.TRAINED, "what of a converted layer the first stage trains")
    flags.DEFINE_list("lengths", [], "tokens of a row whose reading is timed, one or several numbers")


def main() -> None:
    """Converts, and prints the table."""
    folder = Path(FLAGS.folder or Path("runs/converted") / Path(FLAGS.config.partition(":")[0]).stem)
    lengths = lengths_of(FLAGS.lengths)
    print(convert(FLAGS.config, command_line.overrides(), FLAGS.blocks, FLAGS.train, folder, lengths))


if __name__ == "__main__":
    define_flags()
    flags.mark_flag_as_required("config")
    command_line.main(main, overridable=True)
