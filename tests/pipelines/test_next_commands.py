"""What ``bigface train`` says last: commands to copy, and that a resumed run was finished."""

from fr_core.data.synthetic import write_faces
from fr_core.verify.pairs import write_pairs
from tests.helpers.commands import bigface


def test_a_run_ends_with_commands_to_copy_and_a_finished_one_says_so(dataset, tmp_path):
    out = tmp_path / "a run"
    command = ["train", "debug_bigface", f"data.path={dataset}", "train.max_steps=2", "tracking.uri=off"]
    command += ["--in-process", "--out", out]
    told = [f"run: '{out}'", f"next: bigface verify '{out}' --images DIR --pairs PAIRS.csv"]
    told += [f"then: bigface match A.jpg B.jpg --model '{out}'"]
    output = bigface(*command)
    assert output.splitlines()[-3:] == told
    assert "nothing was trained" not in output
    again = bigface(*command, "--resume").splitlines()
    assert again[-3:] == told
    assert again[-4] == (
        f"the run is finished: nothing was trained; its report: '{out}/report.json'; to train longer, repeat the "
        "command with a larger train.epochs (now 2) and train.max_steps (now 2)"
    )
    assert "nothing was trained" not in bigface(*command, "--resume", "train.max_steps=3")


def test_a_run_that_was_verified_goes_on_to_match(dataset, tmp_path):
    write_faces(tmp_path / "faces", 20, 2, workers=1)
    write_pairs(tmp_path / "faces", 2)
    pairs = [f"verify.images={tmp_path / 'faces/images'}", f"verify.pairs={tmp_path / 'faces/pairs.csv'}"]
    short = ["train.max_steps=1", "tracking.uri=off", "--in-process", "--out", tmp_path / "run"]
    output = bigface("train", "debug_bigface", f"data.path={dataset}", *pairs, *short)
    assert output.splitlines()[-1] == f"next: bigface match A.jpg B.jpg --model {tmp_path / 'run'}"
    assert "bigface verify" not in output
