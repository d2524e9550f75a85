import csv

import numpy as np
import pytest

from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from pipelines.datasets.ingest import ingest
from pipelines.datasets.unpack import folder_names, unpack


def content(shards):
    """(identity, JPEG) of all images, and landmarks by JPEG."""
    dataset = open_dataset(shards)
    names = dataset.identity_names()
    rows = [row for shard, group, _ in dataset.row_groups.tolist() for row in dataset.read_images(shard, group)]
    points = {jpeg: None if p is None else p.tolist() for _, _, jpeg, p in rows}
    return sorted((names[label], jpeg) for _, label, jpeg, _ in rows), points


@pytest.mark.parametrize("layout", ["flat", "grouped"])
@pytest.mark.parametrize("form", ["folders", "webdataset"])
def test_there_and_back(photos, tmp_path, layout, form):
    ingest(photos, tmp_path / "a", layout, on_ray=False)
    told = []
    assert unpack(tmp_path / "a", tmp_path / "out", form, lambda *counts: told.append(counts)) == 30
    assert told[-1] == (30, 30)
    ingest(tmp_path / "out", tmp_path / "b", "flat", on_ray=False)
    images, _ = content(tmp_path / "a")
    back, _ = content(tmp_path / "b")
    if form == "webdataset":  # its classes are labels; identities.csv has the names
        with (tmp_path / "out" / "identities.csv").open() as file:
            names = {row["label"]: row["name"] for row in csv.DictReader(file)}
        back = sorted((names[label], jpeg) for label, jpeg in back)
    assert back == images
    assert images == sorted((path.parent.name, path.read_bytes()) for path in photos.rglob("*.jpg"))


def test_landmarks_come_along(photos, tmp_path):
    from fr_core.data.crops import TEMPLATE
    from fr_core.data.landmarks import LANDMARK_COLUMNS

    numbers = ",".join(str(x) for x in np.float32(TEMPLATE).ravel())
    lines = [f"{path.relative_to(photos)},{numbers}" for path in sorted(photos.rglob("*.jpg"))]
    (tmp_path / "points.csv").write_text("\n".join([",".join(("path", *LANDMARK_COLUMNS)), *lines]))
    ingest(photos, tmp_path / "a", landmarks=tmp_path / "points.csv", on_ray=False)
    unpack(tmp_path / "a", tmp_path / "out")
    ingest(tmp_path / "out", tmp_path / "b", landmarks=tmp_path / "out" / "landmarks.csv", on_ray=False)
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert all(points is not None for points in content(tmp_path / "b")[1].values())


def test_names_are_made_safe_and_distinct():
    names = ["Ann", "ann", "../x", "", "..", "a/b", "C:", "é", "x" * 300, "b\0c"]
    safe = folder_names(names)
    assert safe[:2] == ["Ann", "ann-1"]
    assert safe[7] == "é"
    assert all(safe[label] == f"identity{label}" for label in (2, 3, 4, 5, 6, 8, 9))
    assert len({name.lower() for name in safe}) == len(names)


def test_used_folders_are_refused(photos, tmp_path):
    ingest(photos, tmp_path / "a", on_ray=False)
    with pytest.raises(UserError, match="is not empty"):
        unpack(tmp_path / "a", tmp_path / "a")
