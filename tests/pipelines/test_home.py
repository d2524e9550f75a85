"""``~`` is the home folder wherever a path comes in: options, overrides, recipes, addresses of databases."""

from pathlib import Path
from types import NoneType
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.config.reference import held_sections
from fr_core.config.sections import PathOrURL, expand_home
from fr_core.data.store import to_path
from pipelines.cli import app
from pipelines.cli.options import json_output, local, output
from tests.helpers.commands import bigface

NO_PATHS = {"call", "experiment", "net", "parent", "teacher_net"}  # texts in recipes that name something else


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another working folder."""
    for folder in ("home", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_paths_and_databases_expand_and_urls_do_not(home):
    given = ["~/x", "~", "x/~", "s3://bucket/~/x", "sqlite:///~/x.db", "sqlite:///x.db", "off", ""]
    expanded = [f"{home}/x", f"{home}", *given[2:4], f"sqlite:///{home}/x.db", *given[5:]]
    assert list(map(expand_home, given)) == expanded
    assert to_path("~/x") == to_path(Path("~/x")) == home / "x"
    assert str(to_path("s3://bucket/~/x")) == "s3://bucket/~/x"


def sections(section=Config):
    yield section
    for field in section.model_fields.values():
        for held in held_sections(field.annotation):
            yield from sections(held)


def test_every_text_of_a_recipe_is_a_path_or_known_to_be_none():
    texts = {name: field for section in sections() for name, field in section.model_fields.items() if is_text(field)}
    paths = {name for name, field in texts.items() if is_path(field)}
    assert paths == {"path", "backbone", "images", "pairs", "uri", "teacher", "embeddings"}
    assert texts.keys() - paths == NO_PATHS


def parts_of(annotation):
    return set(get_args(annotation) or [annotation]) - {NoneType}


def is_path(field):
    return PathOrURL in parts_of(field.annotation) or PathOrURL.__metadata__[0] in field.metadata


def is_text(field):
    return is_path(field) or parts_of(field.annotation) == {str}


def parameters(commands=app):
    """Each parameter of each command: its name, its type, and what Typer is told of it."""
    for group in commands.registered_groups:
        yield from parameters(group.typer_instance)
    for command in commands.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated:
                yield f"{command.callback.__name__} {name}", *get_args(hint)


def test_every_option_for_a_path_has_a_parser_that_expands():
    """Typer's own type for paths does not."""
    paths = {name: told.parser for name, kind, told in parameters() if Path in parts_of(kind)}
    assert len(paths) > 20
    assert [name for name, parser in paths.items() if parser not in (local, output, json_output)] == []


def test_a_recipe_file_and_overrides(home):
    (home / "own.toml").write_text('data.path = "~/shards"\ninit.backbone = "~/run"\n')
    overrides = [
        "verify.images=~/lfw",
        "verify.pairs=~/lfw.csv",
        "tracking.uri=sqlite:///~/m.db",
        "method.distill.teacher=~/t",
    ]
    config = load_config("~/own.toml", overrides)
    assert (config.data.path, config.init.backbone) == (f"{home}/shards", f"{home}/run")
    assert (config.verify.images, config.verify.pairs) == (f"{home}/lfw", f"{home}/lfw.csv")
    assert config.tracking.uri == f"sqlite:///{home}/m.db"
    assert config.method.distill.teacher == f"{home}/t"


def test_from_photos_to_a_run(home, mlflow_database, tmp_path):
    """No folder of that name is made, in the working folder or below the home."""
    (home / "runs").mkdir()
    (home / "runs" / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    bigface("synth", "--out=~/faces", "--identities", 8, "--shots", 4, "--size", 32)
    bigface("ingest", "~/faces/images", "--out=~/shards", "--size", 32, "--in-process")
    bigface("split", "~/shards", "--out=~/parts", "--share", 0.5, "--pairs", 2)
    small = ["train.epochs=1", "train.max_steps=1", "train.global_batch=8", "data.path=~/parts/train"]
    pairs = ["verify.images=~/parts/verify/images", "verify.pairs=~/parts/verify/pairs.csv"]
    bigface("train", "debug_bigface", *small, *pairs, "--in-process", "--out=~/runs/a", "--json=~/train.json")
    bigface("verify", "~/runs/a", "--images=~/parts/verify/images", "--pairs=~/parts/verify/pairs.csv")
    bigface("runs", "--uri", "sqlite:///~/runs/mlflow.db")
    assert (home / "runs" / "a" / "report.json").is_file()
    assert (home / "train.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(home.rglob("~"))
