"""Names for the leaves of a parameter tree, and the patterns that select them.

Notable: a path joins the keys from the root with "/" ("model/layers/3/attention/q"). A pattern is a
regular expression that has to cover whole components somewhere in the path: "layers/1" selects
layer 1 but not layer 10, "attention" does not select "attention_norm", and ".*norm" selects every
norm. So rules read like the tree and need no anchors.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from fastlm.errors import UserError


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns path -> leaf, in the order of `jax.tree.leaves`."""
    return {_join(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of dicts that has these leaves at their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Returns the tree of `fn(path, leaf, *leaves_of_rest)`; `rest` has the structure of `tree`."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf, *others: fn(_join(keys), leaf, *others), tree, *rest, is_leaf=is_leaf
    )


def matches(pattern: str, path: str) -> bool:
    """Says whether `pattern` covers whole components of `path`.

    Raises:
      UserError: `pattern` is not a regular expression.
    """
    return _compiled(pattern).search(path) is not None


def inside(path: str, parts: Iterable[str]) -> bool:
    """Says whether `path` is one of these parts of a tree, or lies in one."""
    return any(f"{path}/".startswith(f"{part}/") for part in parts)


def require_match(pattern: str, paths: Iterable[str], where: str) -> None:
    """Refuses a pattern that selects nothing, because it is most likely misspelt.

    Raises:
      UserError: names `where`, the pattern and the paths closest to it.
    """
    paths = list(paths)
    if not any(matches(pattern, path) for path in paths):
        closest = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        raise UserError(f"{where}: '{pattern}' matches no parameter path; the nearest are {', '.join(closest)}")


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(f"(?:^|/)(?:{pattern})(?:/|$)")
    except re.error as error:
        raise UserError(f"path pattern '{pattern}': not a regular expression ({error}); mend it") from error


def _join(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
