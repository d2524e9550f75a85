import csv
import json
import multiprocessing as mp
import shutil

import pytest

from fr_core.config.methods import AnyMargin
from fr_core.config.recipes import load_config
from fr_core.config.reference import held_sections
from fr_core.data.schema import open_dataset
from fr_core.data.synthetic import write_faces
from fr_core.errors import UserError
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import write_pairs
from fr_core.verify.report import markdown
from pipelines.experiments import compare
from pipelines.experiments.compare import (
    Conditions,
    differences,
    list_runs,
    summary,
    verdict,
)
from pipelines.experiments.paired import mean_interval
from pipelines.experiments.settings import PUBLISHED, heads, margins, named_settings, schedules
from tests.helpers.commands import bigface
from tests.helpers.datasets import write_dataset


@pytest.fixture(scope="module")
def given(dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    write_faces(root, 20, 2, workers=1)
    write_pairs(root, 10)
    pairs = [f"verify.images={root / 'images'}", f"verify.pairs={root / 'pairs.csv'}"]
    return [
        "debug_bigface",
        f"data.path={dataset}",
        "train.global_batch=128",
        "train.max_steps=99",
        "tracking.uri=off",
        *pairs,
    ]


def compared(given, folder, *options):
    recipe, *overrides = given
    fixed = [
        "--epochs",
        2,
        "--fast-epochs",
        1,
        "--results",
        folder / "r.csv",
        "--in-process",
        "--set",
        "patience=0.2",
        "--set",
        "window=0.2",
    ]
    return bigface("compare", "schedules", recipe, *fixed, *options, *overrides)


def test_a_comparison_goes_on_where_it_was_stopped(given, tmp_path, monkeypatch):
    """Its runs have processes of their own, here of one that has imported all."""
    monkeypatch.setattr(compare, "get_context", lambda _: mp.get_context("forkserver"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = compared(given, tmp_path, "--seeds", 1, "--minutes", 0)
    assert "0 minutes are over" in output or len(list(csv.DictReader((tmp_path / "r.csv").open()))) == 1
    compared(given, tmp_path, "--seeds", 1, "--json", tmp_path / "r.json")
    first = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["setting"], row["epochs"]) for row in first] == [("full", "2"), ("cosine", "1"), ("fastface", "1")]
    assert json.loads((tmp_path / "r.json").read_text())["figures"] == {"runs": 3, "wanted": 3}
    output = compared(given, tmp_path, "--seeds", 1)
    assert list(csv.DictReader((tmp_path / "r.csv").open())) == first
    assert "3 of 3 runs are finished" in output
    assert output.count("accuracy %") == 1
    assert "| --- |" not in output
    output = compared(given, tmp_path, "--seeds", 1, "--markdown")
    assert output.count("accuracy %") == 1
    assert "| --- |" in output
    with pytest.raises(UserError, match="full, seed 0 was run as"):
        compared([*given, "optim.lr=0.01"], tmp_path, "--seeds", 1)


def test_folds_train_and_judge_by_other_people(dataset, grouped, tmp_path):
    settings = {"flat": [], "grouped": [f"data.path={grouped}", "method={kind='dcq', queue_size=64}"]}
    given = [f"data.path={dataset}", "tracking.uri=off"]
    runs = list_runs("debug_bigface", settings, given, Conditions(tmp_path / "r.csv", [0, 1], folds=2))
    assert [(run.setting, run.seed, run.fold) for run in runs[:4]] == [
        *(("flat", 0, "0/2"), ("grouped", 0, "0/2"), ("flat", 0, "1/2"), ("grouped", 0, "1/2")),
    ]
    assert len(runs) == 8
    for run in runs:
        trained = set(open_dataset(run.config.data.path).identity_names())
        judged = {path.split("/")[0] for path in read_pairs(run.config.verify.pairs).paths}
        assert trained
        assert judged
        assert not trained & judged
    given += ["verify.images=x", "verify.pairs=x.csv"]
    with pytest.raises(UserError, match="--folds verifies on people of the training set"):
        list_runs("debug_bigface", settings, given, Conditions(tmp_path / "r.csv", [0], folds=2))


def test_a_comparison_by_folds_writes_a_row_for_each(given, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train_in_child", lambda *_: dict.fromkeys(("accuracy", "seconds"), "0.5"))
    recipe, *overrides = given[:5]
    fixed = ["--results", tmp_path / "r.csv", "--in-process", "--folds", 2, "--setting", "a: train.max_steps=1"]
    output = bigface("compare", "settings", recipe, *fixed, *overrides)
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["setting"], row["seed"], row["fold"]) for row in rows] == [("a", "0", "0/2"), ("a", "0", "1/2")]
    assert "2 of 2 runs are finished" in output
    again = bigface("compare", "settings", recipe, *fixed, "--setting", "b: train.max_steps=1", *overrides)
    assert "against a" in again
    assert "+0.00 (+0.00 … +0.00)" in again
    with pytest.raises(UserError, match="--against c: no such setting: use one of a"):
        bigface("compare", "settings", recipe, *fixed, "--against", "c", *overrides)
    fixed[fixed.index("--folds") + 1] = 3
    assert "3 of 3 runs are finished" in bigface("compare", "settings", recipe, *fixed, *overrides)
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert sum(row["fold"].endswith("/3") for row in rows) == 3  # folds of another cut are other runs


def test_lines_of_other_data_in_the_same_folder_are_refused(given, tmp_path, monkeypatch):
    figures = {"accuracy": "0.5", "seconds": "1", "images": "100", "identities": "25"}
    monkeypatch.setattr(compare, "train_in_child", lambda *_: figures)
    shards = write_dataset(tmp_path / "shards", 100, 25)
    recipe, _, *overrides = [*given, f"data.path={shards}", "train.global_batch=32"]
    asked = ["compare", "settings", recipe, "--results", tmp_path / "r.csv", "--in-process", *overrides, "--setting"]
    bigface(*asked, "a: train.max_steps=1")
    bigface(*asked, "a: train.max_steps=1")
    shutil.rmtree(shards)
    write_dataset(shards, 120, 25)
    for name in ("a", "b"):  # b is the same run by another name
        with pytest.raises(UserError, match=f"{name}, seed 0 was run on 100 images of 25 .*, and there are 120 of 25"):
            bigface(*asked, f"{name}: train.max_steps=1")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 2


def test_differences_by_hand():
    """Seeds 0 and 1 make pairs: 4 and 8 points apart. Student's t of one degree of freedom is 12.706."""
    accuracies = {"a": (0.8, 0.7, 0.2), "b": (0.84, 0.78)}
    rows = [
        {"setting": name, "seed": str(seed), "accuracy": str(value)}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    assert differences(rows, "a", ("accuracy",)) == [
        ("against a", "pairs", "accuracy %"),
        ("b", "2", "+6.00 (-19.41 … +31.41)"),
    ]
    mean, half = mean_interval([1.0, 2.0, 4.0, 7.0])
    assert (mean, half) == pytest.approx((3.5, 4.2100), abs=1e-3)
    assert differences([], "a", ("accuracy",)) == [("against a", "pairs", "accuracy %")]


def test_verdicts_by_hand():
    """An interval that excludes 0 is a difference; of one pair of runs nobody knows."""
    accuracies = {
        "a": (0.80, 0.70, 0.60),
        "up": (0.85, 0.74, 0.65),
        "down": (0.7, 0.6, 0.51),
        "same": (0.81, 0.69, 0.6),
    }
    rows = [
        {"setting": name, "seed": str(seed), "accuracy": str(value)}
        for name, values in (accuracies | {"once": (0.9,)}).items()
        for seed, value in enumerate(values)
    ]
    lines = verdict(rows, "a").splitlines()
    assert [line.split("**")[1] for line in lines] == [
        *("up: better", "down: worse", "same: no difference shown", "once: not known"),
    ]
    assert lines[0].endswith("accuracy +4.67 ± 1.43 points against a, 3 pairs of runs.")


def test_summary_by_hand():
    rows = [{"setting": "a", "accuracy": str(value), "seconds": "10"} for value in (0.8, 0.9)]
    rows.append({"setting": "b", "accuracy": "", "seconds": "7.6"})
    table = summary(rows, ("accuracy", "seconds"))
    assert table == [
        ("setting", "runs", "accuracy %", "seconds"),
        ("a", "2", "85.00 ± 7.07", "10 ± 0"),
        ("b", "1", "", "8"),
    ]
    assert markdown(table).splitlines()[:3] == [
        "| setting | runs | accuracy % | seconds |",
        "| --- | --- | --- | --- |",
        "| a | 2 | 85.00 ± 7.07 | 10 ± 0 |",
    ]


def test_every_head_of_the_papers_tables_is_a_valid_run():
    config = load_config("demo", ["train.epochs=3"])
    tables = heads(config, 1800, 10_177, "flat", "grouped", centres=512, scale=32)
    assert [len(group) for group in tables.values()] == [4, 4, 3, 5]
    for group in tables.values():
        for name, overrides in group.items():
            run = load_config("demo", ["train.epochs=3", *overrides])
            assert run.method.margin.scale == 32
            assert run.data.path == ("flat" if run.method.kind == "bigface" else "grouped")
            assert PUBLISHED.get(name) or PUBLISHED[name.split()[0]]
    equal = tables["5: equal centres"]
    methods = [load_config("demo", overrides).method for overrides in equal.values()]
    assert methods[0].sample_rate == methods[4].size_ratio == 512 / 10_177
    runs = [load_config("demo", overrides) for overrides in equal.values()]
    assert [run.method.centres(10_177, run.train.global_batch) for run in runs] == [0, *[512] * 4]
    virtual = load_config("demo", equal["VFC 512"])
    assert (virtual.train.global_batch, virtual.train.max_steps, virtual.schedule.warmup_epochs) == (64, 1800, 0.25)
    assert virtual.optim.reference_batch == config.optim.reference_batch // 2
    with pytest.raises(UserError, match="centres 500 must be a multiple"):
        heads(config, 1800, 10_177, "flat", "grouped", centres=500, scale=32)


@pytest.mark.parametrize(
    "method",
    [
        "sample_rate = 0.5\nupdate = 'fused'\nmargin = { m1 = 2.0, gradient = 'straight_through' }",
        "kind = 'attfc'\nstrategy = 'single'\norder = 'reference'\nmargin = { past_pi = 'wrap' }",
        "clip_head = 1.0\ntile = 64",
    ],
)
def test_heads_take_no_field_from_the_recipes_method(method, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"[method]\n{method}\n")
    tables = heads(load_config("demo"), 1800, 10_177, "flat", "grouped", centres=512, scale=32)
    for group in tables.values():
        for overrides in group.values():
            assert load_config(recipe, overrides).method == load_config("demo", overrides).method
    with pytest.raises(UserError, match="without a teacher"):
        heads(load_config("debug_distill"), 1800, 10_177, "flat", "grouped", centres=512, scale=32)


def test_margins_differ_in_nothing_but_the_margin():
    recipe = load_config("demo")
    runs = {name: load_config("demo", given) for name, given in margins(recipe).items()}
    kinds = {section.model_fields["kind"].default for section in held_sections(AnyMargin)}
    assert {run.method.margin.kind for run in runs.values()} == kinds
    for run in runs.values():
        assert run.method.margin.scale == recipe.method.margin.scale
        method = run.method.model_copy(update={"margin": recipe.method.margin, "subcentres": 1})
        assert run.model_copy(update={"method": method}) == recipe
    assert (runs["ArcFace"].method.margin.m2, runs["ArcFace"].method.margin.m3) == (0.5, 0)
    assert runs["3 sub-centres"].method.subcentres == 3
    with pytest.raises(UserError, match="has none"):
        margins(load_config("debug_attfc"))


def test_schedules_warm_up_as_long_as_the_recipe():
    runs = {name: load_config("bigface_small", given) for name, given in schedules(16, 4, ["patience=0.2"]).items()}
    assert [run.schedule.kind for run in runs.values()] == ["cosine", "cosine", "fastface"]
    assert [run.train.epochs for run in runs.values()] == [16, 4, 4]
    recipe = load_config("bigface_small").schedule
    assert {run.schedule.warmup_epochs for run in runs.values()} == {recipe.warmup_epochs}
    assert runs["fastface"].schedule.patience == 0.2


def test_named_settings():
    given = ["sgd: optim.lr=0.1 train.epochs=2", "lars 2048: optim.kind=lars"]
    expected = {"sgd": ["optim.lr=0.1", "train.epochs=2"], "lars 2048": ["optim.kind=lars"]}
    assert named_settings(given) == expected
    for wrong, message in (
        ([], "nothing to compare"),
        (["optim.lr=0.1"], "write 'NAME"),
        ([": optim.lr=0.1"], "write 'NAME"),
        (["a: seed=1", "a: seed=2"], "a is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            named_settings(wrong)


def test_mistakes(given, tmp_path):
    with pytest.raises(UserError, match="no pairs to compare by"):
        compared(given[:4], tmp_path)
    (tmp_path / "r.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="not a results file"):
        compared(given, tmp_path)
