"""The Dockerfile: what it copies, and its build steps, run by a user without rights in a fresh folder."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "pipelines/cluster/Dockerfile"
NOBODY = 65534
# Of root's rights only that to read: the user neither owns nor may write what others own.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all,+dac_read_search"]
AS_NOBODY += ["--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search"]
root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be another user")


def steps():
    """The instructions and their words, in order."""
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def is_ignored(path):
    """Whether ``.dockerignore`` keeps a path out; the last rule that fits a path or a folder above it holds."""
    ignored = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        names = path.parts if "**/" in rule else [str(Path(*path.parts[:n])) for n in range(1, len(path.parts) + 1)]
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            ignored = not rule.startswith("!")
    return ignored


def copy(words, place):
    """Do a COPY of files and folders that keep their names."""
    *sources, target = (word for word in words.split() if not word.startswith("--"))
    assert target in ("./", *sources)
    for path in (path for source in sources for path in (ROOT / source, *(ROOT / source).rglob("*"))):
        there = place / path.relative_to(ROOT)
        if path.is_file() and not is_ignored(path.relative_to(ROOT)):
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)


def test_only_what_is_installed_travels():
    copied = [word for name, words in steps() if name == "COPY" for word in words.split()[1:-1]]
    assert set(copied) == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"} | {
        "fr_core",
        "pipelines",
        "tune_spaces",
    }
    assert all((ROOT / name).exists() and not is_ignored(Path(name)) for name in copied)
    for name in (".venv/bin/python", "runs/demo/report.json", ".git/config", "tests/conftest.py", "faces/a.jpg"):
        assert is_ignored(Path(name))
    assert is_ignored(Path("fr_core/data/__pycache__/plan.cpython-311.pyc"))
    assert not is_ignored(Path("fr_core/recipes/debug_bigface.toml"))


def test_what_is_copied_belongs_to_the_user_that_builds():
    assert all(words.startswith("--chown=1000:100 ") for name, words in steps() if name == "COPY")
    assert not [words for name, words in steps() if name == "USER"]
    installs = [words for name, words in steps() if name == "RUN"]
    assert "-c constraints.txt" in installs[0]


@root
@pytest.mark.soak
@pytest.mark.parametrize("owned", [True, False])
def test_the_build_steps_run_as_a_user_without_rights(owned, tmp_path):
    """Without --chown they do not, as pip builds in the folder. What would be downloaded is left out."""
    place, site = tmp_path / "bigface", tmp_path / "site"
    place.mkdir()
    site.mkdir()
    os.chown(site, NOBODY, NOBODY)
    pip = [*AS_NOBODY, sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    pip += ["--no-cache-dir", "--upgrade", "--target", str(site), "."]
    environment = os.environ | {"HOME": str(site), "TMPDIR": str(site), "PYTHONPATH": ""}
    done = []
    for name, words in steps():
        if name == "COPY":
            copy(words, place)
            for path in [place, *place.rglob("*")]:
                os.chown(path, *(2 * [NOBODY if owned else 0]))
        elif name == "RUN":
            done.append(subprocess.run(pip, cwd=place, env=environment, capture_output=True, text=True))
    assert len(done) == 2
    if owned:
        assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
        for path in ("fr_core/train/loop.py", "pipelines/cli/__init__.py", "fr_core/recipes/debug_bigface.toml"):
            assert (site / path).is_file()
    else:
        assert all("Permission denied" in one.stdout + one.stderr for one in done)
