"""The rules of the rooms, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import caltech_hpo

PACKAGE = Path(caltech_hpo.__file__).parent
ROOMS = ("data", "training", "search", "results", "cli")
SHARED = {"spec", "ranges", "terms", "errors", "study_files", "study_checks", "__init__"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "studies" not in path.parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    allowed = set(ROOMS[: ROOMS.index(room(path)) + 1]) if room(path) else set()
    if path == PACKAGE / "__init__.py":  # what the package offers, imported when it is used
        allowed = {"results"}
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "caltech_hpo" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_who_may_know_torch_and_optuna(path):
    roots = {module.split(".")[0] for module in imports(path)}
    if room(path) in ("data", "training"):
        assert "optuna" not in roots
    if room(path) in ("search", "cli") and path.name != "worker.py":
        assert "torch" not in roots


def test_only_final_loads_the_test_split():
    users = {
        path.name
        for path in MODULES
        if "caltech_hpo.data.loading.load_test_data" in imports(path)
        or "caltech_hpo.data.loading.TestData" in imports(path)
    }
    assert users == {"final.py"}


def test_only_the_command_line_prints():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "print" not in names or room(path) == "cli", path


def test_weights_never_run_code():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert flags.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_modules_and_functions_stay_short():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 265, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and room(path) != "cli":  # options make commands long
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_the_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys, caltech_hpo.cli.app; "
        "heavy = ('torch', 'torchvision', 'optuna', 'matplotlib', 'plotly', 'jinja2', 'scipy', 'sklearn', "
        "'numpy', 'pydantic', 'sqlalchemy'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
