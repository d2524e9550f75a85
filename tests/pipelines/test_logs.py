import json
import logging
import os
import subprocess
import sys

import pytest

from fr_core.data.store import refuse_job_folder, to_path
from fr_core.errors import UserError
from pipelines.logs import IN_JOB, log_event, start_logging, turn_output_into_events
from pipelines.train import progress_facts, progress_text
from tests.helpers.commands import bigface


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("BIGFACE_LOG", IN_JOB):
        monkeypatch.delenv(name, raising=False)


def test_lines_for_people(capsys):
    start_logging(run="a")
    log_event({"step": 20, "loss": 4.89061, "lr": 0.1}, None)  # no event
    log_event({"step": 20, "loss": 4.89061, "accuracy": 0.75}, "runs/a/checkpoints/step_20")
    (line,) = capsys.readouterr().err.splitlines()
    assert line[8:] == " checkpoint saved  step 20  loss 4.891  accuracy 0.75  checkpoint runs/a/checkpoints/step_20"


def test_numbers_of_lines_are_short_and_none_is_rounded_to_nothing(capsys):
    start_logging(run="a")
    facts = {"lr": 5e-7, "img/s": 12345.6, "loss": float("inf"), "step": 123456}
    logging.getLogger("bigface").info("progress", extra={"facts": facts})
    assert capsys.readouterr().err.strip().endswith("progress  lr 5e-07  img/s 12346  loss inf  step 123456")


def test_progress_leaves_out_a_rate_that_is_not_known_yet():
    first = {"step": 1, "loss": 9.70641, "lr": 5e-7}
    assert progress_text(first) == "loss 9.706  lr 5e-07"
    assert progress_text(first | {"images_per_second": 779.5}) == "loss 9.706  lr 5e-07  780 img/s"
    assert progress_text(first | {"images_per_second": 0.4}) == "loss 9.706  lr 5e-07  0.4 img/s"
    assert progress_facts(first, 8) == {"step": 1, "of": 8, "loss": 9.70641, "lr": 5e-7}
    assert progress_facts(first | {"images_per_second": 80.0}, 8)["img/s"] == 80


@pytest.mark.parametrize(("name", "value"), [("BIGFACE_LOG", "json"), (IN_JOB, "{}")])
def test_objects_for_programs(monkeypatch, capsys, name, value):
    """Where the variable asks for them, and in a Ray job; as every JSON parser takes them."""
    monkeypatch.setenv(name, value)
    start_logging(run="a", rank=1)
    log_event({"step": 4, "loss": float("nan")}, None)
    log_event({"step": 8, "loss": 1.5, "accuracy": 0.75}, None)
    logging.getLogger("bigface").info("resumed", extra={"facts": {"step": 3}})  # as fr_core does
    events = [
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
        for line in capsys.readouterr().err.splitlines()
    ]
    assert [(event["level"], event["event"], event["step"]) for event in events] == [
        ("warning", "loss not finite, step dropped", 4),
        ("info", "verified", 8),
        ("info", "resumed", 3),
    ]
    assert all((event["run"], event["rank"]) == ("a", 1) and event["node"] for event in events)
    assert events[0]["loss"] == "nan"
    assert events[0]["time"].endswith("+00:00")


def test_whatever_a_library_prints_is_an_event(monkeypatch, capsys):
    """Half lines wait for their end; blank lines and the stream's own events stay what they are."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # the test's own streams come back at its end
    start_logging("json", run="a")
    turn_output_into_events()
    print("\033[33ma table\033[0m")
    sys.stdout.write("half a ")
    sys.stdout.write("line\n\n")
    print("Traceback (most recent call last):", file=sys.stderr)
    logging.getLogger("bigface").info("resumed", extra={"facts": {"loss": float("inf"), "rows": [{"a": None}]}})
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["level"], event["event"]) for event in events] == [
        ("info", "a table"),
        ("info", "half a line"),
        ("warning", "Traceback (most recent call last):"),
        ("info", "resumed"),
    ]
    assert (events[3]["loss"], events[3]["rows"]) == ("inf", [{"a": None}])
    assert [event.get("printed") for event in events] == [True, True, True, None]


@pytest.mark.parametrize(
    ("words", "code", "wanted"),
    [
        ("plan bigface_r50 --identities 1000", 0, {"GiB per card": "info"}),
        ("train nothing", 2, {"no recipe 'nothing'": "error"}),
        ("train", 2, {"RECIPE": "error"}),
    ],
)
def test_all_that_a_command_prints_in_a_job_is_json(words, code, wanted):
    command = [sys.executable, "-m", "pipelines.cli", *words.split()]
    environment = os.environ | {"BIGFACE_LOG": "json"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    for part, level in wanted.items():
        assert any(part in event["event"] and event["level"] == level for event in events), events


def test_no_third_style(monkeypatch):
    monkeypatch.setenv("BIGFACE_LOG", "xml")
    with pytest.raises(UserError, match="BIGFACE_LOG=xml: use json or text"):
        start_logging()


@pytest.mark.parametrize("command", ["train debug_bigface", "ingest faces", "embed net --data shards", "runs"])
def test_a_job_may_not_keep_what_it_makes_in_its_own_copy(tmp_path, monkeypatch, command):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    given = ["--json", "runs/a.json"] if command == "runs" else ["--out", "runs/a"]
    with pytest.raises(UserError, match=r"runs/a.*: give an absolute path that all nodes see, or a URL"):
        bigface(*command.split(), *given)
    refuse_job_folder(tmp_path / "runs")
    refuse_job_folder(to_path("s3://bucket/runs"))
