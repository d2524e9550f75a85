"""How the tests themselves are built."""

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
HEAVY = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    found = {"mlflow", "ray"} & sys.modules.keys()
    if found:
        sys.exit(f"{name} imports {found}")
"""


def imported(tree):
    """Full names of all that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def module_of(path):
    return ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)


def on_ranks(path):
    """Modules of the functions that a file hands to ``run_ranks``."""
    tree = ast.parse(path.read_text())
    homes = {f.name: module_of(path) for f in tree.body if isinstance(f, ast.FunctionDef)}
    homes |= {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_ranks")
    return {homes[ast.unparse(call.args[1])] for call in calls}


def test_what_files_share_lies_in_helpers():
    """No file imports a test file or a conftest. The pretend card is a program of its own."""
    wrong = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in FILES
        for name in imported(ast.parse(path.read_text()))
        if name.startswith((".", "tests."))
        if not name.startswith(("tests.helpers.", "tests.pretend_card."))
        or any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]
    assert wrong == []


def test_what_ranks_run_imports_neither_ray_nor_mlflow():
    """Each rank would import them again, for seconds."""
    modules = set().union(*map(on_ranks, FILES))
    assert {"tests.helpers.runs", "tests.fr_core.heads.test_sharded_fc"} <= modules
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *sorted(modules)], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
