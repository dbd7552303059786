"""From a config to an `Experiment`: everything a run is made of, each part checked by name.

Notable: this is the only file below the entry points that sees the config's sections. Each section
is the keyword arguments of one constructor, so a key exists in exactly one place, and a misspelt or
ill-typed one is an error here, before anything compiles.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from fastlm import configuration, tasks
from fastlm.compress import WRAPPERS, Setting
from fastlm.configuration import naming
from fastlm.data import pipeline, tokenizers
from fastlm.data.settings import Data, Evaluation
from fastlm.decoding import inputs
from fastlm.decoding import sample as sampling
from fastlm.errors import UserError, nearest
from fastlm.models import Compute, Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks.kind import TaskKind
from fastlm.tasks.task import Task
from fastlm.training import initial, optimizers, schedules
from fastlm.training import state as states
from fastlm.training.initial import Init
from fastlm.training.precision import loss_scale_for
from fastlm.training.settings import Checkpoint, Logging, Sample, Training

# Sections that are values; those in PARTS are the arguments of what they make.
SETTINGS: dict[str, type] = {
    "data": Data,
    "training": Training,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "logging": Logging,
    "sample": Sample,
    "init": Init,
}
PARTS = ("task", "model", "compute", "tokenizer", "optimizer", "schedule", "mesh")
OF_CHECKPOINT = "checkpoint"  # the kind of tokenizer that is another run's, whose workdir is its path
SECTIONS = ("seed", "wrappers", *PARTS, *SETTINGS, *WRAPPERS)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, ready to start. `notes` are lines to read before it does."""

    workdir: Path
    config: dict[str, Any]
    seed: int
    model: Model
    tokenizer: tokenizers.Tokenizer
    kind: TaskKind
    task: Task
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    data: Data
    training: Training
    evaluation: Evaluation
    checkpoint: Checkpoint
    logging: Logging
    sample: Sample
    init: Init
    origin: dict[str, Any]
    notes: tuple[str, ...]
    train_batches: Callable[[], pipeline.BatchIterator]
    eval_batches: Callable[[str, int], Iterator[dict]]
    initial_params: Callable[[], Any] | None

    def setting(self) -> Setting:
        """Returns what wrappers may know of the run."""
        return _setting(self.model, self.kind, self.tokenizer, self.mesh, self.data, self.training, self.init)

    def create_state(self, model_params: Any = None) -> states.State:
        """Returns the state before the first step (run it under `jit`), from given weights if there are any."""
        return states.create(
            self.task,
            self.model,
            self.optimizer,
            seed=self.seed,
            rows=self.data.batch_size,
            average=self.training.average_decay > 0,
            loss_scale=loss_scale_for(self.model.compute.dtype),
            model_params=model_params,
        )


def build(config: Mapping[str, Any], workdir: str | Path) -> Experiment:
    """Checks a config and makes its parts.

    Raises:
      UserError: whatever in it cannot work, naming section and key.
    """
    _check_names(config, workdir)
    section = lambda name: _section(config, name)
    seed = configuration.checked(config.get("seed", 0), int, "config.seed")
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed: must be at least 0 and below 2**32, got {seed}")
    chosen = {name: configuration.make(kind, name, section(name)) for name, kind in SETTINGS.items()}
    data, training, evaluation, sample = (chosen[name] for name in ("data", "training", "evaluation", "sample"))
    compute = configuration.make(Compute, "compute", section("compute"))
    start = initial.start(chosen["init"]) if chosen["init"].source else None
    if start is None:
        cfg = configuration.make(ModelConfig, "model", section("model"))
    else:
        cfg = start.architecture(section("model"))
    schedule = configuration.make(schedules.make, "schedule", section("schedule"), steps=training.steps)
    mesh = meshes.make(**_checked_ints("mesh", section("mesh")))
    _check_batch("data.batch_size", data.batch_size, training.accumulation, mesh)
    if evaluation.batch_size:
        _check_batch("evaluation.batch_size", evaluation.batch_size, 1, mesh)

    with naming("data"):
        kind = tasks.make_kind(section("task")).resolve(data)
    if section("tokenizer").get("kind") == OF_CHECKPOINT:
        with naming("tokenizer"):
            tokenizer = initial.start(_source_of_tokenizer(section("tokenizer"))).tokenizer
    elif start is None or section("tokenizer").get("path"):
        with naming("tokenizer"):
            tokenizer = make_tokenizer(section("tokenizer"), kind, data)
    else:
        tokenizer, kind = start.tokenizer, kind.going_on_from(start.task)
    cfg = fit_vocabulary(cfg, tokenizer, data.length)
    with naming("data"):
        cfg = kind.fit(cfg, tokenizer, data)
    model = Model(cfg, compute)
    kind.check_scoring(model)
    _check_prompts(sample.prompts, tokenizer, model)
    setting = _setting(model, kind, tokenizer, mesh, data, training, chosen["init"])
    task = _wrapped(kind.make(model, tokenizer), setting, config)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), model.init(jax.random.key(0))))
    optimizer = make_optimizer(section("optimizer"), schedule, task, shapes)
    eval_batches = functools.partial(_naming_data(kind.eval_batches), cfg, tokenizer, data, evaluation)
    for split in {evaluation.split, evaluation.final_split} - {""}:
        eval_batches(split, 1)  # a missing split should not wait for the first evaluation
    return Experiment(
        workdir=Path(workdir),
        config=dict(config) | {"task": tasks.describe_kind(kind)},
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        mesh=mesh,
        train_batches=lambda: task.join(_naming_data(kind.train_batches)(cfg, tokenizer, data, seed)),
        eval_batches=lambda split, limit: task.join_evaluation(eval_batches(split, limit)),
        origin=start.origin if start is not None and tokenizer is start.tokenizer else {},
        notes=() if start is None else initial.notes(start, cfg),
        initial_params=None if start is None else functools.partial(start.params, cfg, mesh, seed),
        **chosen,
    )


def _setting(
    model: Model,
    kind: TaskKind,
    tokenizer: tokenizers.Tokenizer,
    mesh: Mesh,
    data: Data,
    training: Training,
    init: Init,
) -> Setting:
    documents = functools.partial(kind.documents, data)
    return Setting(model, kind, tokenizer, mesh, data.length, training.steps, _checkpoint, documents, init.source)


def _checkpoint(workdir: str, step: str) -> initial.Start:
    initial.check_source(workdir, "config.distilled.teachers")
    return initial.start(Init(workdir, step))


def _naming_data(make: Callable[..., Any]) -> Callable[..., Any]:
    """Names the section in what the data has to say."""

    def named(*arguments: Any, **more: Any) -> Any:
        with naming("data"):
            return make(*arguments, **more)

    return named


def make_tokenizer(values: dict[str, Any], kind: TaskKind, data: Data) -> tokenizers.Tokenizer:
    """Makes the tokenizer of a config; "bpe" learns on the training split."""
    documents = kind.documents(data) if values.get("kind") == "bpe" else None
    return configuration.make(tokenizers.make, "tokenizer", values, documents=documents, data_dir=data.data_dir)


def _source_of_tokenizer(values: dict[str, Any]) -> Init:
    """Checks the section of a tokenizer that a trained model has."""
    values = configuration.arguments(tokenizers.make, "tokenizer", values, ("documents", "data_dir"))
    if not values.get("path"):
        raise UserError(f"config.tokenizer.path: kind '{OF_CHECKPOINT}' needs the workdir of a trained model")
    initial.check_source(values["path"], "config.tokenizer.path")
    return Init(values["path"])


def _wrapped(task: Task, setting: Setting, config: Mapping[str, Any]) -> Task:
    """Folds the wrappers that `config.wrappers` names, each made from its own section."""
    for name in configuration.checked(config.get("wrappers", ()), tuple[str, ...], "config.wrappers"):
        if name not in WRAPPERS:
            raise UserError(f"config.wrappers: no '{name}'{nearest(name, WRAPPERS)}; one of: {', '.join(WRAPPERS)}")
        task = configuration.make(WRAPPERS[name], name, _section(config, name))(task, setting)
    return task


def make_optimizer(
    values: dict[str, Any], schedule: optax.Schedule, task: Task, shapes: Any
) -> optax.GradientTransformation:
    """Makes the optimizer of a config; what the task freezes comes before the config's own groups."""
    groups = tuple((path, {"frozen": True}) for path in task.frozen) + tuple(values.get("groups", ()))
    values = values | ({"groups": groups} if groups else {})
    return configuration.make(optimizers.make, "optimizer", values, learning_rate=schedule, params=shapes)


def fit_vocabulary(cfg: ModelConfig, tokenizer: tokenizers.Tokenizer, length: int) -> ModelConfig:
    """Fills in or checks the vocabulary and the context length of a model for its data."""
    if cfg.vocab_size == 0:
        cfg = dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)
    if cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size: {cfg.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; "
            "set it to 0 to match"
        )
    if length > cfg.max_length:
        raise UserError(f"config.data.length: {length} is more than config.model.max_length {cfg.max_length}; raise it")
    return cfg


def _checked_ints(name: str, values: dict[str, Any]) -> dict[str, int]:
    configuration.make(lambda *, data=-1, fsdp=1, tensor=1, sequence=1: None, name, values)
    return {key: configuration.checked(value, int, f"config.{name}.{key}") for key, value in values.items()}


def _check_names(config: Mapping[str, Any], workdir: str | Path) -> None:
    if "://" in str(workdir):
        raise UserError(
            f"--workdir: {workdir} is no folder; mount the bucket and give its path, shared by all processes"
        )
    for key in config:
        if key not in SECTIONS:
            raise UserError(
                f"config.{key}: no such section{nearest(key, SECTIONS) or '; one of: ' + ', '.join(SECTIONS)}"
            )


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = config.get(name, {})
    if not isinstance(values, Mapping):
        raise UserError(f"config.{name}: is a section; set one of its keys, as in config.{name}.KEY, not {values!r}")
    return dict(values)


def _check_prompts(prompts: tuple[str, ...], tokenizer: tokenizers.Tokenizer, model: Model) -> None:
    # They are used when the run ends: too late to learn that one does not fit.
    cfg = model.cfg
    if prompts and (cfg.family != "decoder" or cfg.head != "language_model"):
        raise UserError("config.sample.prompts: only a language model continues text; leave it empty for this task")
    if prompts:
        try:
            inputs.check_kinds(cfg)
            jax.eval_shape(lambda: model.empty_cache(1, 1))
        except UserError as error:
            raise UserError(f"config.sample.prompts: {error}; leave it empty, or choose another kind") from None
    for prompt in prompts:
        with naming("sample.prompts"):
            inputs.check_lengths([len(sampling.prompt_ids(tokenizer, prompt))], 1, cfg.max_length)


def _check_batch(name: str, batch_size: int, accumulation: int, mesh: Mesh) -> None:
    cut, processes = mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
    if cut % processes:  # each process reads rows of its own
        raise UserError(f"config.mesh: data x fsdp = {cut} is no multiple of the {processes} processes; enlarge one")
    if accumulation < 1 or batch_size % accumulation:
        raise UserError(f"config.training.accumulation: {accumulation} does not divide the batch of {batch_size} rows")
    if (batch_size // accumulation) % cut:
        raise UserError(
            f"config.{name}: {batch_size} rows / {accumulation} microbatches are not divided by the "
            f"{cut} devices of mesh axes data x fsdp; change one of them"
        )
