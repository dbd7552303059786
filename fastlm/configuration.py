"""From config sections to calls: checks names and types before anything compiles.

Notable: `make(ModelConfig, "model", values)` calls a dataclass or a function with the keyword
arguments of one config section. A key that the target does not take, or a value of the wrong type,
is a `UserError` naming section, key, and the nearest valid key. Below this module nothing sees a
ConfigDict. Lists become tuples, whole numbers are accepted where fractions are meant.
"""

import ast
import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from fastlm.errors import UserError, nearest


def make(target: Callable[..., Any], section: str, values: Mapping[str, Any], **given: Any) -> Any:
    """Returns `target(**values, **given)` after checking `values` against its signature.

    Raises:
      UserError: unknown key, wrong type, or missing required key, with the section named.
    """
    found = arguments(target, section, values, given)
    parameters = inspect.signature(target).parameters
    required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    missing = [name for name in required if name not in found and name not in given]
    if missing:
        raise UserError(f"config.{section}: missing key(s) {', '.join(missing)}")
    return target(**found, **given)


def arguments(
    target: Callable[..., Any], section: str, values: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """Returns `values` as the keyword arguments that `target` declares, except those `given` elsewhere.

    Raises:
      UserError: unknown key or wrong type, with the section named.
    """
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    valid = [name for name in inspect.signature(target).parameters if name not in given]
    found = {}
    for key, value in values.items():
        if key not in valid:
            hint = nearest(key, valid) or f"; valid keys: {', '.join(sorted(valid))}"
            raise UserError(f"config.{section}.{key}: no such key{hint}")
        found[key] = checked(value, hints.get(key, Any), f"config.{section}.{key}")
    return found


def checked(value: Any, hint: Any, where: str) -> Any:
    """Returns `value` in the type `hint` asks for, or raises a `UserError` that names `where`."""
    value = _plain(value)
    if not _matches(value, hint):
        expected = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("typing.", "")
        raise UserError(f"{where}: expected {expected}, got {value!r} ({type(value).__name__})")
    if _accepts(hint, float) and not _accepts(hint, int) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def call(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """Reads a name with options, "local" or "local(window=64)", as (name, options).

    Raises:
      UserError: it is neither.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {str(option.arg): ast.literal_eval(option.value) for option in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UserError(f"{where}: '{text}' is no name with options; write NAME or NAME(option=number, ...)")


def at_least(section: str, settings: Any, **least: int) -> None:
    """Checks fields of a section against the least they may be."""
    for key, value in least.items():
        if getattr(settings, key) < value:
            raise UserError(f"config.{section}.{key}: must be at least {value}, got {getattr(settings, key)}")


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
    """Names the section in what a part below, which knows no config, has to say."""
    try:
        yield
    except UserError as error:
        known = str(error).startswith("config.")
        raise UserError(str(error) if known else f"config.{section}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(option is kind for option in _options(hint))


def _matches(value: Any, hint: Any) -> bool:
    return any(_matches_one(value, option) for option in _options(hint))


def _matches_one(value: Any, option: Any) -> bool:
    if option is Any or isinstance(option, str):
        return True
    if option in (None, type(None)):
        return value is None
    kind = typing.get_origin(option) or option
    if not inspect.isclass(kind):
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, tuple):
        return isinstance(value, tuple) and _items_match(value, typing.get_args(option))
    if kind in (str, bool):
        return isinstance(value, kind)
    return True


def _items_match(value: tuple, arguments: tuple) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(_matches(v, arguments[0]) for v in value)
    return not arguments or (len(value) == len(arguments) and all(_matches(v, a) for v, a in zip(value, arguments)))
