"""What every entry point does first: read a config, apply overrides, turn user errors into one line.

Notable: overrides are `--config.model.layers=8` as with ml_collections, but parsed here, because a
per-layer tuple may stand where the file has a number (`--config.model.heads="(4, 8)"`), and because
a misspelt key must be one line that names the nearest valid one. `--config=path.py:argument` passes
the argument to `get_config`.
"""

import ast
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app
from ml_collections import ConfigDict

from fastlm.errors import UserError, exit_on_user_error, nearest
from fastlm.parallel import multihost

PREFIX = "--config."


def main(entry: Callable[[], None]) -> None:
    """Parses flags and runs `entry`; a `UserError` ends as one line and status 2."""

    def start(argv: list[str]) -> None:
        with exit_on_user_error():
            if len(argv) > 1:
                raise UserError(f"unexpected argument '{argv[1]}'; flags start with --, overrides with {PREFIX}")
            setup()
            entry()

    arguments, _OVERRIDES[:] = split_overrides(sys.argv)
    app.run(start, argv=arguments)


_OVERRIDES: list[str] = []


def overrides() -> list[str]:
    """Returns the overrides of this command line, as `model.layers=8`."""
    return list(_OVERRIDES)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.x=y` and `--config.x y` from the other arguments."""
    rest, found, waiting = [], [], None
    for argument in argv:
        if waiting is not None:
            found.append(f"{waiting}={argument}")
            waiting = None
        elif argument.startswith(PREFIX):
            name = argument[len(PREFIX) :]
            waiting = None if "=" in name else name
            if waiting is None:
                found.append(name)
        else:
            rest.append(argument)
    return rest, found + ([f"{waiting}="] if waiting else [])


def setup() -> None:
    """Joins a multi-process run and turns on the persistent compilation cache."""
    multihost.initialize()
    folder = os.environ.get("FASTLM_CACHE", str(Path.home() / ".cache" / "fastlm"))
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_config(path: str, changes: list[str]) -> dict[str, Any]:
    """Runs `get_config` of a Python file, applies overrides, and returns plain dicts.

    Raises:
      UserError: no such file, no `get_config` in it, an override of an unknown key.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        here = sorted(str(p) for p in Path(file).parent.glob("*.py")) if Path(file).parent.is_dir() else []
        raise UserError(f"--config: no file {file}{nearest(file, here)}")
    spec = importlib.util.spec_from_file_location(f"_config_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path.cwd()))  # configs import their base as `configs.base`
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config: {file}, line {error.lineno}: {error.msg}") from None
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {file} defines no get_config(); see configs/base.py")
    config = module.get_config(argument) if argument else module.get_config()
    for change in changes:
        override(config, change)
    return config.to_dict()


def override(config: ConfigDict, change: str) -> None:
    """Applies one `section.key=value` to `config`.

    Raises:
      UserError: a section or key that the config lacks.
    """
    path, _, text = change.partition("=")
    *parents, key = path.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, key]):
        if not isinstance(node, ConfigDict) or name not in node:
            where = ".".join(["config", *path.split(".")[:depth]])
            valid = list(node.keys()) if isinstance(node, ConfigDict) else []
            hint = nearest(name, valid) or f"; it has: {', '.join(sorted(valid))}"
            raise UserError(f"--config.{path}: {where} has no '{name}'{hint}")
        if depth < len(parents):
            node = node[name]
    with node.ignore_type():  # types are checked, by name, where the section is used
        node[key] = parse_value(text, node[key])


def parse_value(text: str, old: Any) -> Any:
    """Reads a Python literal; anything else is a string. A string stays one where the file has a string."""
    if isinstance(old, str) and not text.strip().startswith(("(", "[", "'", '"')):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text
