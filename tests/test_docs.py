"""README and the pages of ``docs/``: short, plain, linked, and equal to what generates them; their commands run."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import bigface
from tests.helpers.sentences import LIMIT, counted, sources

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CODE = sources([str(ROOT / name) for name in ("fr_core", "pipelines", "tune_spaces")])
TESTS = sources([str(ROOT / "tests")])
RUNNABLE = re.compile(r"<!-- runnable -->\n```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)?(#[\w-]+)?\)")
# A path of this repository, as code, recipes and pages cite it.
CITED = re.compile(
    r"(?<![\w/.-])(?<!\]\()((?:docs|results|fr_core|pipelines|tune_spaces|tests)/[\w/-]+\.(?:md|py|csv|toml|yaml|png|svg))\b"
)
# A row that says what a file holds: `FILE`: `name`, `name` …
HOLDS = re.compile(r"`((?:fr_core|pipelines|tune_spaces)/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)")
WRITTEN_THERE = {"fr_core/recipes/NAME.toml"}  # a placeholder
GENERATED = {"docs/knobs.md"}  # its sentences are the attribute docstrings


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Make the anchors of a page's headings, as GitHub and MkDocs do."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", text)).strip().lower().replace(" ", "-") for text in headings}


def test_readme_is_at_most_15_kb():
    assert README.stat().st_size <= 15_000


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_link_leads_somewhere(path):
    for target, anchor in LINK.findall(path.read_text()):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{named(path)} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor[1:] in anchors(there), f"{named(path)} links to {target}{anchor}"


def test_every_file_that_code_and_pages_cite_is_there():
    more = [
        *ROOT.glob("fr_core/recipes/*.toml"),
        *ROOT.glob("pipelines/cluster/*"),
        ROOT / "cluster.yaml",
        ROOT / "Makefile",
    ]
    missing = []
    for path in [*CODE, *PAGES, *more]:
        text = path.read_text()
        new = set(re.findall(r"^`([\w/.]+)` \(new\):", text, re.MULTILINE))  # docs/extending.md adds these
        cited = set(CITED.findall(text)) - WRITTEN_THERE - new
        missing += [
            f"{named(path)}: {name}" for name in sorted(cited) if "NAME" not in name and not (ROOT / name).exists()
        ]
        missing += [f"{named(path)}: {name}" for name in ("METHODS", "EXPERIMENTS.md") if name in text]
    assert missing == []


def test_every_name_that_pages_give_of_a_file_is_in_it():
    missing, found = [], 0
    for path in PAGES:
        for file, names in HOLDS.findall(path.read_text()):
            source = (ROOT / file).read_text()
            for name in re.findall(r"`(\w+)`", names):
                found += 1
                if not re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE):
                    missing.append(f"{named(path)}: {file} holds no {name}")
    assert found > 50
    assert missing == []


def test_the_tables_of_the_pages_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = tables.pages()
    assert len(found) >= 6
    assert [named(path) for path, text in found.items() if path.read_text() != text] == [], "make generated"


def test_the_site_builds_without_a_warning(tmp_path):
    asked = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "methods" / "attfc" / "index.html").is_file()


@pytest.mark.parametrize("kind", ["docstrings", "comments", "pages"])
def test_sentences_are_short(kind):
    paths = [path for path in PAGES if named(path) not in GENERATED] if kind == "pages" else [*CODE, *TESTS]
    found = counted(paths, kind)
    assert len(found) > 300
    long = [f"{s.words} words, {s.where}: {' '.join(s.text.split())}" for s in found if s.words > LIMIT]
    assert long == []


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "usage.md"], ids=named)
def test_runnable_blocks_run_from_an_empty_folder(path, tmp_path, mlflow_database, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_database, tmp_path / "runs" / "mlflow.db")
    blocks = RUNNABLE.findall(path.read_text())
    assert blocks
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        program, *args = shlex.split(line, comments=True)
        assert program == "bigface"
        output = bigface(*args)
        if args[0] == "match":
            assert "the same person" in output or "different people" in output
