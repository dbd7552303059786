"""What every entry point does first: read a config, apply overrides, turn user errors into one line.

Notable: overrides are `--config.model.layers=8` as with ml_collections, but parsed here, because a
per-layer tuple may stand where the file has a number (`--config.model.heads="(4, 8)"`), and because
a misspelt key must be one line that names the nearest valid one. `--config=path.py:argument` passes
the argument to `get_config`. Where training starts from a trained model, the section `model` keeps only what
was said of it: the rest is that model's. Only warnings of the libraries are shown; `--verbosity=0` shows the rest.
"""

import ast
import contextlib
import dataclasses
import errno
import importlib.util
import inspect
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from fastlm.errors import UserError, exit_on_user_error, nearest
from fastlm.models import ModelConfig
from fastlm.parallel import multihost
from fastlm.parallel.allocator import keep_freed_memory
from fastlm.tasks import KINDS

PREFIX = "--config."


def main(entry: Callable[[], None], *, overridable: bool = False) -> None:
    """Parses flags and runs `entry`; a `UserError` ends as one line and status 2, Ctrl-C as status 130.

    Args:
      overridable: whether `entry` reads a config and applies `overrides()`; elsewhere they are refused.
    """

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise UserError(f"unexpected argument '{argv[1]}'; flags start with --")
        if _OVERRIDES and not overridable:
            raise UserError(f"{PREFIX}{_OVERRIDES[0].partition('=')[0]}: this command reads no config to override")
        setup()
        entry()

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        with exit_on_user_error(), _last_word():
            arguments, _OVERRIDES[:] = split_overrides(sys.argv)
            app.run(start, argv=arguments, flags_parser=_parse_flags)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextlib.contextmanager
def _last_word() -> Iterator[None]:
    """Keeps threads from complaining, as the process ends, about what the one line of a `UserError` says."""
    try:
        yield
    except UserError:
        sys.unraisablehook = threading.excepthook = lambda unhandled: None
        raise


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["verbosity"].using_default_value:  # absl would raise it to INFO after this
            flags.FLAGS.verbosity = absl_logging.WARNING
        return rest
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; --help lists the flags") from None


_OVERRIDES: list[str] = []


def overrides() -> list[str]:
    """Returns the overrides of this command line, as `model.layers=8`."""
    return list(_OVERRIDES)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.x=y` and `--config.x y` from the other arguments.

    Raises:
      UserError: an override without a value.
    """
    rest, found, waiting = [], [], None
    for argument in [*argv, None]:
        if waiting is not None:
            if argument is None or argument.startswith("--"):
                raise UserError(f"{PREFIX}{waiting}: no value given; write {PREFIX}{waiting}=VALUE")
            found.append(f"{waiting}={argument}")
            waiting = None
        elif argument is not None and argument.startswith(PREFIX):
            name = argument[len(PREFIX) :]
            waiting = None if "=" in name else name
            if waiting is None:
                found.append(name)
        elif argument is not None:
            rest.append(argument)
    return rest, found


def _without_echoes(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a hook for exceptions outside the main thread that leaves out those which follow from a full disk.

    TensorStore's threads still report to the loop that Orbax has closed, and TensorBoard's writer tries again
    at exit: pages of stack traces around the one line that says what happened.
    """

    def hook(unhandled: Any) -> None:
        error = unhandled.exc_value
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        abandoned = inspect.iscoroutine(getattr(unhandled, "object", None))  # Orbax's, after one of them failed
        if not full and not abandoned and str(error) != "Event loop is closed":
            report(unhandled)

    return hook


def setup() -> None:
    """Quietens the libraries, keeps host memory, joins a multi-process run, turns on the compilation cache."""
    sys.unraisablehook = _without_echoes(sys.__unraisablehook__)
    threading.excepthook = _without_echoes(threading.__excepthook__)
    logging.getLogger("fastlm").setLevel(min(logging.root.level, logging.INFO))
    multihost.initialize()
    if jax.default_backend() == "cpu":  # elsewhere large arrays are not malloc's, and threads want arenas
        keep_freed_memory()
    folder = os.environ.get("FASTLM_CACHE", str(Path.home() / ".cache" / "fastlm"))
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_config(path: str, changes: list[str]) -> dict[str, Any]:
    """Runs `get_config` of a Python file, applies overrides, and returns plain dicts.

    Raises:
      UserError: no such file, no `get_config` in it, an exception in it, an override of an unknown key.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        here = sorted(str(p) for p in Path(file).parent.glob("*.py")) if Path(file).parent.is_dir() else []
        raise UserError(f"--config: no file {file}{nearest(file, here)}")
    config = _run_config(file, argument)
    for change in changes:  # first, because it decides which keys there are
        if change.startswith("task.name=") and "task" in config:
            config.task = ConfigDict({"name": change.partition("=")[2]})
    if "task" in config:
        _complete(config.task, KINDS.get(config.task.get("name", "language_modeling")))
    said = {change.partition("=")[0] for change in changes}
    if "model" in config:
        said |= _said_of_model(config.model)
        _complete(config.model, ModelConfig)
    for change in changes:
        override(config, change)
    values = config.to_dict()
    if values.get("init", {}).get("source"):
        values["model"] = {key: value for key, value in values.get("model", {}).items() if f"model.{key}" in said}
    return values


def _said_of_model(section: ConfigDict) -> set[str]:
    """Returns which keys a file says something about, as "model.layers".

    Of the base's section, which has them all, those whose values are not the defaults; of one of its own, all of it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    whole = defaults.keys() <= set(section)
    return {f"model.{key}" for key in section if not whole or section[key] != defaults.get(key)}


def _complete(section: ConfigDict, kind: type | None) -> None:
    """Adds the defaults of the class that a section is made into, so that they can be overridden too."""
    for field in dataclasses.fields(kind) if kind else ():  # an unknown name is an error where the kind is made
        if field.name not in section:
            section[field.name] = field.default


def _run_config(file: str, argument: str) -> ConfigDict:
    """Returns what `get_config` of a file returns; whatever goes wrong in there is named with its line."""
    spec = importlib.util.spec_from_file_location(f"_config_{Path(file).stem}", file)
    if spec is None:
        raise UserError(f"--config: {file} is no Python file; see configs/base.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path.cwd()))  # configs import their base as `configs.base`
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {file} defines no get_config(); see configs/base.py")
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config: {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise UserError(f"--config: {where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {file} returns {type(config).__name__}, not a ConfigDict")
    return config


def override(config: ConfigDict, change: str) -> None:
    """Applies one `section.key=value` to `config`.

    Raises:
      UserError: a section or key that the config lacks.
    """
    path, _, text = change.partition("=")
    *parents, key = path.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, key]):
        where = ".".join(["config", *path.split(".")[:depth]])
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{path}: {where} is a value, not a section; set it as --{where}=VALUE")
        if name not in node:
            valid = [str(valid_name) for valid_name in node]
            hint = nearest(name, valid) or f"; it has: {', '.join(sorted(valid))}"
            raise UserError(f"--config.{path}: {where} has no '{name}'{hint}")
        if depth < len(parents):
            node = node[name]
    if isinstance(node[key], ConfigDict):
        raise UserError(
            f"--config.{path}: is a section; set one of its keys, as in --config.{path}.{next(iter(node[key]))}"
        )
    value = parse_value(text, node[key])
    with node.unlocked():
        del node[key]  # else 100 becomes 100.0 where the file has 0.1; types are checked where the section is used
        node[key] = value


def parse_value(text: str, old: Any) -> Any:
    """Reads a Python literal; anything else is a string. A string stays one where the file has a string."""
    if isinstance(old, str) and not text.strip().startswith(("(", "[", "'", '"')):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text
