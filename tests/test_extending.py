"""Follows docs/extending.md to the letter, on a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^`([\w/.]+)`(?: \(new\))?:\n\n```(python|diff)\n(.*?)^```", re.M | re.S)


def apply_page(page: str, sources: Path) -> list[str]:
    """Write the new files of the page, apply its changes, and return the paths of all files.

    The lines of a change without a sign, and those with ``-``, must occur in the file exactly once, in this order.
    """
    touched = []
    for path, kind, text in BLOCK.findall(page):
        file = sources / path
        if kind == "python":
            assert not file.exists(), f"{path} is there already"
            file.write_text(text)
        else:
            for change in text.split("@@\n"):
                lines = change.splitlines(keepends=True)
                before = "".join(line[1:] for line in lines if line[0] in " -")
                after = "".join(line[1:] for line in lines if line[0] in " +")
                content = file.read_text()
                assert content.count(before) == 1, f"{path} changed: bring docs/extending.md up to date:\n{before}"
                file.write_text(content.replace(before, after))
        touched.append(path)
    return touched


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with everything that the page adds."""
    sources = tmp_path_factory.mktemp("extended")
    for name in ("fr_core", "pipelines", "tune_spaces", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", sources)
    apply_page((ROOT / "docs" / "extending.md").read_text(), sources)
    return sources


def test_the_page_says_which_files_each_addition_touches():
    """The «Files» line of each chapter names exactly the files of its blocks."""
    page = (ROOT / "docs" / "extending.md").read_text()
    chapters = [chapter for chapter in page.split("\n## ")[1:] if "\nFiles: " in chapter]
    assert len(chapters) == 5
    for chapter in chapters:
        said = re.search(r"^Files: (.*?)\n\n", chapter, re.M | re.S)[1]
        named = set(re.findall(r"`([\w/.]+\.py)`", said))
        touched = {path for path, _, _ in BLOCK.findall(chapter)}
        new = [path for path in touched if not (ROOT / path).exists()]
        placeholders = {re.sub(r"\w+\.py$", "NAME.py", path) for path in new}
        assert named == (touched - set(new)) | placeholders, chapter.split("\n")[0]


def test_the_page_fits_the_sources(extended):
    """What it says to add and to change can be applied, and compiles."""
    for path, _, _ in BLOCK.findall((ROOT / "docs" / "extending.md").read_text()):
        compile((extended / path).read_text(), path, "exec")


@pytest.mark.soak
def test_what_the_page_adds_trains(extended):
    """The tests in ``tests/extended`` pass on the extended sources."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/extended"]
    environment = os.environ | {"PYTHONPATH": str(extended), "BIGFACE_EXTENDED": "1"}
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


@pytest.mark.soak
def test_mypy_passes_the_extended_sources_and_names_a_forgotten_case(extended):
    mypy = [sys.executable, "-m", "mypy"]
    done = subprocess.run(mypy, cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    dispatch = extended / "fr_core" / "train" / "methods" / "__init__.py"
    whole = dispatch.read_text()
    dispatch.write_text(whole.replace("        case NPair():\n            return None\n", ""))
    done = subprocess.run(mypy, cwd=extended, capture_output=True, text=True)
    dispatch.write_text(whole)
    assert "methods/__init__.py" in done.stdout
    assert "NPair" in done.stdout
