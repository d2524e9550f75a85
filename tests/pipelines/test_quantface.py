"""``bigface train`` of method quantface, and what is checked and computed before it."""

import pytest

from fr_core.config.recipes import load_config
from fr_core.errors import UserError
from fr_core.train.metrics import read_metrics
from pipelines.experiments.plan import plan
from pipelines.train import with_absolute_paths
from tests.helpers.commands import bigface, figures


@pytest.fixture(scope="module")
def teacher(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    given = ["train.max_steps=20", "tracking.uri=off"]
    bigface("train", "debug_bigface", f"data.path={dataset}", *given, "--in-process", "--out", out)
    return out


def follow(dataset, teacher, out, *args):
    given = [f"data.path={dataset}", f"method.teacher={teacher}", "tracking.uri=off"]
    bigface("train", "debug_quantface", *given, "--in-process", "--out", out, *args)


def test_a_student_comes_nearer_to_its_teacher(dataset, teacher, tmp_path):
    follow(dataset, teacher, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == figures(tmp_path / "run" / "report.json")["steps"] == 40
    first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.5 * first
    for row in rows:
        assert row["loss"] == pytest.approx(0.02 * row["positive_loss"] + 0.01 * row["negative_loss"], rel=1e-5)
        for net in ("teacher", "student"):
            rising = [row[f"threshold_{net}_1e-{k}"] for k in range(1, 7)]
            assert rising == sorted(rising)
            assert rising[0] < rising[-1]


def test_no_epoch_takes_a_moment(dataset, teacher, tmp_path):
    follow(dataset, teacher, tmp_path / "run", "train.epochs=0")
    assert figures(tmp_path / "run" / "report.json")["steps"] == 0


def test_mistakes_before_the_run(dataset, teacher, tmp_path):
    for args, message in (
        (["method.teacher=nobody"], "no such run, checkpoint or weights file"),
        (["net.embedding=16", "method.loss=mse"], r"net\.embedding=32, or method\.loss\.kind=ekd"),
    ):
        with pytest.raises(UserError, match=message):
            follow(dataset, teacher, tmp_path / "run", *args)
    with pytest.raises(UserError, match=r"no teacher is named: give method\.teacher=RUN$"):
        bigface("train", "debug_quantface", f"data.path={dataset}", "--in-process", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teachers_path_is_that_of_any_working_directory(teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    config = with_absolute_paths(load_config("debug_quantface", ["method.teacher=teacher"]))
    assert config.method.teacher == f"{teacher.resolve()}/checkpoints/step_00000020"


def test_the_plan_shows_the_one_mode_there_is(teacher):
    table, advice, found = plan(load_config("debug_quantface", [f"method.teacher={teacher}"]), 1000, 1, 24)
    assert table[0] == ("part", "as written")
    assert "No teacher" not in advice
    assert found["teacher_gib"] > 0
    advice = plan(load_config("debug_quantface"), 1000, 1, 24)[1]
    assert "No teacher is counted: give method.teacher=REF." in advice
    assert "cards" in plan(load_config("debug_quantface"), 1000, 1, 0.7)[1]
