import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fr_core.data.listing import read_image
from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from pipelines.datasets.ingest import ingest


def images(listing):
    rows = listing.images.to_pylist()
    return [
        (
            listing.names[row["label"]],
            read_image(listing.kind, listing.files[row["file"]], row["path"], row["start"], row["length"]),
        )
        for row in rows
    ]


@pytest.fixture
def exported(photos, tmp_path):
    """The photos as two files of a hub's export: structs of bytes, numbered classes whose names the metadata has."""
    faces = sorted(photos.rglob("*.jpg"))
    names = [f"person{i}" for i in range(6)]
    told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    (tmp_path / "hub").mkdir()
    for number, part in enumerate((faces[:13], faces[13:])):
        table = pa.table(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for path in part],
                "label": pa.array([names.index(path.parent.name) for path in part], pa.int64()),
            }
        ).replace_schema_metadata({"huggingface": json.dumps(told)})
        pq.write_table(table, tmp_path / "hub" / f"train-{number}.parquet", row_group_size=5)
    return tmp_path / "hub"


def test_an_export_is_read_as_the_photos_are(photos, exported, tmp_path):
    expected = sorted((path.parent.name, path.read_bytes()) for path in photos.rglob("*.jpg"))
    listing = list_source(exported, scratch=tmp_path / "scratch")
    assert sorted(images(listing)) == expected
    assert set(listing.paths) == {f"{i}.jpg" for i in range(5)}
    manifest = ingest(exported, tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.identities, manifest.rejects) == (30, 6, {})
    assert open_dataset(tmp_path / "shards").identity_names() == [f"person{i}" for i in range(6)]
    assert not (tmp_path / "shards.scratch").exists()


def test_plain_bytes_and_names_are_read_and_what_is_no_image_is_rejected(photos, tmp_path):
    faces = sorted(photos.rglob("*.jpg"))[:4]
    data = [path.read_bytes() for path in faces]
    pq.write_table(
        pa.table({"Name": ["ann", "ben"] * 4, "jpg": [*data, None, b"", b"broken", data[0][:300]]}),
        tmp_path / "faces.parquet",
    )
    manifest = ingest(tmp_path / "faces.parquet", tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.identities, sum(manifest.rejects.values())) == (4, 2, 4)


def test_what_was_unpacked_is_used_until_the_source_changes(exported, tmp_path):
    scratch = tmp_path / "scratch"
    first = images(list_source(exported, scratch=scratch))
    before = (scratch / "00000.images").stat().st_mtime_ns
    assert images(list_source(exported, scratch=scratch)) == first
    assert (scratch / "00000.images").stat().st_mtime_ns == before
    table = pq.read_table(exported / "train-0.parquet")
    pq.write_table(table.slice(1), exported / "train-0.parquet")
    assert len(images(list_source(exported, scratch=scratch))) == 29


def test_wrong_files_are_named(photos, tmp_path):
    cases = {
        "no parquet": (None, "not a readable Parquet"),
        "no image": (pa.table({"label": [1]}), "none of the columns image, img"),
        "no identity": (pa.table({"image": [b"x"]}), "none of the columns identity, label"),
        "null": (pa.table({"image": [b"x", b"y"], "label": [1, None]}), "row 1 has no identity"),
    }
    for name, (table, message) in cases.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(b"PAR1 broken") if table is None else pq.write_table(table, path)
        with pytest.raises(UserError, match=message):
            list_source(path, scratch=tmp_path / "scratch")
    ingest(photos, tmp_path / "shards", on_ray=False)
    with pytest.raises(UserError, match="already a dataset"):
        list_source(tmp_path / "shards")


def test_many_row_groups_come_out_whole(tmp_path):
    random = np.random.default_rng(0)
    table = pa.table({"image": [random.bytes(1000) for _ in range(2000)], "label": np.arange(2000) % 7})
    pq.write_table(table, tmp_path / "faces.parquet", row_group_size=100)
    listing = list_source(tmp_path / "faces.parquet", scratch=tmp_path / "scratch")
    assert sorted(data for _, data in images(listing)) == sorted(table["image"].to_pylist())
