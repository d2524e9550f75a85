"""The events of workers, from the run's folder to the command's log."""

import json
import logging

import pytest

from fr_core.data.store import to_path
from pipelines.events import FAILED, EventFile, Followed
from pipelines.logs import start_logging

log = logging.getLogger("bigface")


@pytest.fixture(params=["a folder", "a URL"])
def out(request, tmp_path):
    return to_path(tmp_path / "run" if request.param == "a folder" else f"file://{tmp_path}/run")


def logged(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_what_rank_0_logs_reaches_the_command_once_and_in_order(out, capsys):
    start_logging("json")
    worker, controller = EventFile(out, "rank0", {"rank": 0, "node": "a"}), EventFile(out, "ray", {})
    worker.write(1.0, logging.INFO, "resumed", {"step": 10})  # of an earlier start
    followed = Followed(out)
    followed.log_new()
    assert not logged(capsys)
    worker.write(20.0, logging.INFO, "resumed", {"step": 40, "loss": float("nan")})
    controller.write(8.0, logging.WARNING, FAILED, {"rank": 1, "reason": "killed"})
    controller.write(9.0, logging.WARNING, FAILED, {"rank": 2, "reason": "killed"})
    followed.log_new()
    followed.log_new()
    failed, other, resumed = logged(capsys)
    assert (failed["event"], failed["level"], failed["rank"], failed["reason"]) == (
        "worker failed",
        "warning",
        1,
        "killed",
    )
    assert other["rank"] == 2
    assert (resumed["event"], resumed["step"], resumed["loss"], resumed["node"]) == ("resumed", 40, "nan", "a")
    assert resumed["seconds_since_failure"] == 12
    assert resumed["time"] == "1970-01-01T00:00:20.000+00:00"


def test_a_worker_that_starts_again_keeps_the_events_before(out):
    EventFile(out, "rank0", {}).write(1.0, logging.INFO, "a", {})
    EventFile(out, "rank0", {}).write(2.0, logging.INFO, "b", {})
    lines = (out / "events" / "rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["a", "b"]


def test_half_a_line_of_a_killed_worker_is_left_out(tmp_path, capsys):
    """Nothing of its successor is lost."""
    start_logging("json")
    followed, file = Followed(tmp_path), tmp_path / "events" / "rank0.jsonl"
    EventFile(tmp_path, "rank0", {}).write(1.0, logging.INFO, "a", {})
    with file.open("a") as half:
        half.write('{"created": 2.0, "lev')
    followed.log_new()
    assert [event["event"] for event in logged(capsys)] == ["a"]
    successor = EventFile(tmp_path, "rank0", {})
    for event in ("b", "c"):
        successor.write(3.0, logging.INFO, event, {})
    followed.log_new()
    assert [event["event"] for event in logged(capsys)] == ["b", "c"]
    assert len(file.read_text().splitlines()) == 4


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "events").write_text("a file in place of the folder")
    EventFile(tmp_path, "rank0", {}).emit(log.makeRecord("bigface", logging.INFO, "", 0, "saved %d", (3,), None))
    assert (tmp_path / "events").is_file()
