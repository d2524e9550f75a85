import csv
import json
import shutil

import cv2
import numpy as np
import pytest

from fr_core.config.sections import Masks
from fr_core.data.crops import TEMPLATE, encode
from fr_core.data.landmarks import LANDMARK_COLUMNS
from fr_core.data.photos import read_rgb
from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.suites import find_sets
from pipelines.datasets.mask import mask
from tests.helpers.commands import bigface

ALL = Masks(ratio=1)


def rows_of(path):
    return list(csv.DictReader(path.open()))


def points_file(folder, points):
    lines = [",".join(("path", *LANDMARK_COLUMNS))]
    lines += [",".join((path, *map(str, np.ravel(own)))) for path, own in points.items()]
    (folder / "points.csv").write_text("\n".join(lines))
    return folder / "points.csv"


def test_a_folder_is_copied_with_masks_on_its_share(photos, tmp_path):
    figures = mask(photos, tmp_path / "out", Masks(ratio=0.5), seed=3)
    worn = {row["path"]: row["tool"] for row in rows_of(tmp_path / "out" / "masks.csv")}
    assert len(worn) == figures["images"] == 30
    assert 5 < figures["masked"] == sum(tool != "" for tool in worn.values()) < 25
    for path, tool in worn.items():
        same = (tmp_path / "out" / path).read_bytes() == (photos / path).read_bytes()
        assert same == (tool == "")
    assert (tmp_path / "out" / "masks.png").stat().st_size > 10_000
    mask(photos, tmp_path / "again", Masks(ratio=0.5), seed=3)
    assert all((tmp_path / "again" / path).read_bytes() == (tmp_path / "out" / path).read_bytes() for path in worn)


def test_masks_follow_the_landmarks(photos, tmp_path):
    """A face that is turned in the plane has its mask turned."""
    path = "person0/0.jpg"
    turn = cv2.getRotationMatrix2D((56, 70), 15, 1.0)
    own = points_file(tmp_path, {f"people/{path}": TEMPLATE @ turn[:, :2].T + turn[:, 2]})
    mask(photos, tmp_path / "plain", ALL)
    mask(photos, tmp_path / "turned", ALL, landmarks=own)
    before = read_rgb((photos / path).read_bytes()).astype(int)
    tilt = []
    for name in ("plain", "turned"):
        ys, xs = np.nonzero(np.abs(read_rgb((tmp_path / name / path).read_bytes()) - before).max(2) > 60)
        tilt.append(np.polyfit(xs, ys, 1)[0])
    assert tilt[1] < tilt[0] - 0.1


def test_pairs_become_a_suite_of_masked_sets(photos, tmp_path):
    pairs = tmp_path / "pairs.csv"
    rows = [(f"person{i}/0.jpg", f"person{i + same}/1.jpg", 1 - same, i % 3) for i in range(5) for same in (0, 1)]
    pairs.write_text("image_a,image_b,same,fold\n" + "\n".join(",".join(map(str, row)) for row in rows))
    out = tmp_path / "sets"
    assert mask(photos, out, Masks(rendered=1), pairs_file=pairs) == {"images": 11, "masked": 11, "rejected": 0}
    assert {row["tool"] for row in rows_of(out / "masked" / "masks.csv")} == {"rendered"}
    sets = find_sets(out)
    assert list(sets) == ["masked_masked", "masked_plain", "plain"]
    mixed = read_pairs(sets["masked_plain"][1])
    assert all(mixed.paths[i].startswith("masked/") for i in mixed.left)
    assert all(mixed.paths[i].startswith("standard/") for i in mixed.right)
    assert np.array_equal(mixed.same, read_pairs(pairs).same)
    assert np.array_equal(mixed.fold, read_pairs(pairs).fold)
    model = tmp_path / "net.safetensors"
    save(model)
    bigface("verify", model, "--net", "iresnet10", "--suite", out, "--json", tmp_path / "v.json")
    found = json.loads((tmp_path / "v.json").read_text())["figures"]
    assert {"plain_accuracy", "masked_plain_accuracy", "masked_masked_accuracy"} <= found.keys()


def save(path):
    from safetensors.torch import save_file

    save_file(IResNet(10, 8, 1, 32, 8).state_dict(), path)


def test_what_cannot_be_masked_is_listed(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "faces")
    (tmp_path / "faces" / "person0" / "0.jpg").write_bytes(b"broken")
    (tmp_path / "faces" / "person0" / "1.jpg").write_bytes(encode(np.zeros((50, 80, 3), np.uint8)))
    grey = cv2.cvtColor(cv2.imread(str(photos / "person0" / "2.jpg")), cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(tmp_path / "faces" / "person0" / "2.jpg"), grey)
    output = bigface("mask", tmp_path / "faces", "--out", tmp_path / "out", "--json", tmp_path / "m.json")
    assert "left out: 2 images" in output
    assert json.loads((tmp_path / "m.json").read_text())["figures"] == {"images": 30, "masked": 28, "rejected": 2}
    listed = {row["path"]: row["reason"] for row in rows_of(tmp_path / "out" / "rejects.csv")}
    assert listed == {"person0/0.jpg": "unknown image format", "person0/1.jpg": "no square crop"}
    out = read_rgb((tmp_path / "out" / "person0" / "2.jpg").read_bytes()).astype(int)
    assert np.abs(out - out.mean(2, keepdims=True)).max() <= 3


@pytest.mark.parametrize("outside", ["{photos}/person0/0.jpg", "../people/person0/0.jpg"])
def test_nothing_is_written_where_pairs_lead_out(photos, tmp_path, outside):
    before = {path: path.read_bytes() for path in photos.rglob("*.jpg")}
    pairs = tmp_path / "pairs.csv"
    rows = [f"{outside.format(photos=photos)},person0/1.jpg,1,0", "person0/0.jpg,person1/0.jpg,0,1"]
    pairs.write_text("image_a,image_b,same,fold\n" + "\n".join(rows))
    with pytest.raises(UserError, match="leads out of"):
        mask(photos, tmp_path / "out", ALL, pairs_file=pairs)
    assert {path: path.read_bytes() for path in photos.rglob("*.jpg")} == before
    assert not (tmp_path / "out").exists()


def test_files_are_what_their_names_say(photos, tmp_path):
    source = tmp_path / "faces"
    source.mkdir()
    cv2.imwrite(str(source / "a.png"), cv2.imread(str(photos / "person0" / "0.jpg")))
    mask(source, tmp_path / "worn", ALL)
    mask(source, tmp_path / "bare", Masks(ratio=0))
    for name in ("worn", "bare"):
        assert (tmp_path / name / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    strangers = points_file(tmp_path, {"somebody.jpg": TEMPLATE})
    for source, out, landmarks, said in (
        (tmp_path / "absent", tmp_path / "a", None, "no such folder"),
        (tmp_path / "full", tmp_path / "a", None, "no images in it"),
        (photos, tmp_path / "full", None, "is not empty"),
        (photos, photos / "masked", None, "name another folder"),
        (photos, tmp_path / "a", strangers, "names none of the images"),
    ):
        with pytest.raises(UserError, match=said):
            mask(source, out, ALL, landmarks)
