"""The floors of the design: a file imports from its own floor or below, and models never import compress."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors", "configuration"},
    {"ops", "parallel"},
    {"models"},
    {"data", "decoding", "measurement"},
    {"tasks"},
    {"compress"},
    {"training"},
    {"search", "reports", "exports"},
    {"command_line", "train", "evaluate", "generate", "measure", "export", "convert", "harness", "predict"},
    {"experiments"},
]
TOP_LEVEL = {
    "README.md",
    "requirements.txt",
    "fastlm",
    "configs",
    "experiments",
    "tests",
    "launch",
    "LICENSE",
    "NOTICE",
}
TOP_LEVEL |= {"pyproject.toml"}


def floor(part: str) -> int:
    for height, parts in enumerate(FLOORS):
        if part in parts:
            return height
    raise AssertionError(f"'{part}' stands on no floor: add it to FLOORS where the design puts it")


def imports(path: Path) -> set[str]:
    """Parts of the project that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastlm" and len(parts) > 1:
                found.add(parts[1])
            elif parts[0] == "experiments":
                found.add("experiments")
    return found


def breaches(root: Path) -> list[str]:
    bad = []
    for path in sorted((root / "fastlm").rglob("*.py")):
        parts = path.relative_to(root / "fastlm").with_suffix("").parts
        if parts == ("__init__",):
            continue
        here = floor(parts[0])
        bad += [f"{path.relative_to(root)} imports {part}" for part in imports(path) if floor(part) > here]
    return bad


def test_no_file_imports_from_a_higher_floor():
    assert breaches(ROOT) == []


def test_a_breach_would_be_seen(tmp_path):
    (tmp_path / "fastlm" / "ops").mkdir(parents=True)
    (tmp_path / "fastlm" / "ops" / "bad.py").write_text("def f():\n    from fastlm.training import loop\n")
    assert breaches(tmp_path) == ["fastlm/ops/bad.py imports training"]


def test_only_build_and_entry_points_know_config_dicts():
    allowed = {"fastlm/command_line.py"}
    users = {
        str(p.relative_to(ROOT)) for p in (ROOT / "fastlm").rglob("*.py") if "ml_collections import" in p.read_text()
    }
    assert users == allowed


def test_only_mesh_py_makes_meshes():
    makers = {p.name for p in (ROOT / "fastlm").rglob("*.py") if "make_mesh(" in p.read_text()}
    assert makers == {"mesh.py"}


def test_what_is_said_is_said_by_our_own_loggers():
    """Absl's logger is Orbax's too, which is silenced while checkpoints are open."""
    said = re.compile(r"from absl import .*\blogging\b(?! as absl_logging)|absl_logging\.(info|warning|error|log)")
    assert [p.name for p in (ROOT / "fastlm").rglob("*.py") if said.search(p.read_text())] == []


def test_top_level_is_fixed():
    here = {
        p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("runs", "data", "__pycache__")
    }
    assert here <= TOP_LEVEL, here - TOP_LEVEL


def test_every_name_is_defined():
    """Ruff's check is off, because it takes the dims of jaxtyping's hints for names; these have one letter."""
    command = ["ruff", "check", ".", "--select", "F821", "--output-format", "json", "--exit-zero", "--no-cache"]
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [
        (one["message"].split("`")[1], f"{one['filename']}:{one['location']['row']}")
        for one in json.loads(found.stdout)
    ]
    assert any(len(name) == 1 for name, _ in names), "the check itself found nothing"
    assert [place for place in names if len(place[0]) > 1] == []
