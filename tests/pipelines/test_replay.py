import json

import pytest

from fr_core.errors import UserError
from tests.helpers.commands import bigface
from tests.helpers.machine import REAL_DATA, needs_real_data


@needs_real_data
@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--form", "haar", "--set", "m=4000"], 12),
        (["--form", "recurrence", "--set", "start=published"], 6),
        ([], 8),
    ],
)
def test_the_published_log(tmp_path, options, count):
    log = REAL_DATA / "fastface" / "ms1mv3_r100.csv"
    output = bigface("replay", log, *options, "--picture", tmp_path / "r.png", "--json", tmp_path / "r.json")
    assert "202,320 steps" in output
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["changes"]) == report["figures"]["changes"] == count
    assert report["changes"][0]["factor"] == 0.5
    assert report["changes"][0]["rate"] == pytest.approx(0.01)
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_log_of_single_steps(tmp_path):
    """Two windows of 5 steps, then 10 stationary steps from step 10 on, and the next one cuts."""
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss,lr\n" + "".join(f"{step},2.0,0.1\n" for step in range(1, 101)))
    bigface("replay", log, "--set", "patience=0.1", "--picture", tmp_path / "r.png", "--json", tmp_path / "r.json")
    changes = json.loads((tmp_path / "r.json").read_text())["changes"]
    assert [change["step"] for change in changes[:2]] == [21, 32]


def test_a_replay_leaves_no_file_unasked(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{step},2.0\n" for step in range(1, 101)))
    monkeypatch.chdir(tmp_path)
    output = bigface("replay", "log.csv")
    assert "100 steps" in output
    assert "figure" not in output  # one table
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "not readable"),
        ("", [], "needs columns"),
        ("a,b\n1,2\n", [], "needs columns step, loss"),
        ("step,loss\n", [], "holds no losses"),
        ("step,loss\n1,nan\n", [], "the loss of step 1 is nan"),
        ("step,loss\n1,2\n1,2\n", [], "steps must rise"),
        ("step,loss\n1,x\n", [], "not readable"),
        ("step,loss\n1\n", [], "not readable"),
        ("step,loss\n9,2\n", [], "--set window=0.05 of 9 steps"),
        ("step,loss\n9,2\n", ["--form", "recurrence"], "--set patience=0.05 of 9 steps"),
        ("step,loss\n9,2\n", ["--form", "haar", "--set", "window=0.01"], "--set window=0.01 of 9 steps"),
        (
            "step,loss\n99,2\n",
            ["--form", "recurrence", "--set", "alpha=2"],
            "--set alpha=2: Input should be less than 1",
        ),
        ("step,loss\n99,2\n", ["--form", "wave"], "recurrence, haar"),
        ("step,loss\n99,2\n", ["--lr", "-1"], "--lr -1: a rate is greater than 0"),
        ("step,loss\n99,2\n", ["--set", "foo=1"], "--set foo=1: no such setting; run has"),
        ("step,loss\n80,2\n", ["--form", "haar", "--set", "m=2000"], "after 8,000 steps .*, and the log has 80"),
        ("step,loss\n99,2\n", ["--form", "recurrence", "--set", "m=4000"], "recurrence has alpha"),
        ("step,loss\n99,2\n", ["--set", "alpha"], "not of the form"),
    ],
)
def test_bad_logs_and_settings(tmp_path, text, options, message):
    if text is not None:
        (tmp_path / "log.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        bigface("replay", tmp_path / "log.csv", *options, "--picture", tmp_path / "r.png")
