import base64
import json
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fr_core.data.listing import read_image
from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from pipelines.datasets.ingest import ingest
from tests.helpers.containers import save_to_disk


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


NAMES = [f"person{i}" for i in range(6)]
TOLD = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}


def table_of(faces, told=None, **columns):
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in faces]
    labels = pa.array([NAMES.index(path.parent.name) for path in faces], pa.int64())
    table = pa.table({"image": cells, "label": labels, **columns})
    return table.replace_schema_metadata({"huggingface": json.dumps(told)} if told else None)


@pytest.mark.parametrize("told", ["in the table", "in dataset_info.json"])
def test_what_save_to_disk_writes(photos, tmp_path, told):
    faces = sorted(photos.rglob("*.jpg"))
    expected = sorted((path.parent.name, path.read_bytes()) for path in faces)
    tables = [table_of(part, TOLD if told == "in the table" else None) for part in (faces[:7], faces[7:20], faces[20:])]
    info = {} if told == "in the table" else TOLD["info"]
    save_to_disk(tmp_path / "one", tables, info)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of an earlier map")
    assert sorted(images(list_source(tmp_path / "one", scratch=tmp_path / "scratch"))) == expected
    for split, part in (("train", tables[:2]), ("test", tables[2:])):
        save_to_disk(tmp_path / "dict" / split, part, info)
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    manifest = ingest(tmp_path / "dict", tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.identities, manifest.rejects) == (30, 6, {})
    assert open_dataset(tmp_path / "shards").identity_names() == NAMES
    shutil.rmtree(tmp_path / "dict" / "test")
    with pytest.raises(
        UserError, match=r"dict/test: no tables in it, but .*dataset_dict\.json names it: copy it again"
    ):
        list_source(tmp_path / "dict", scratch=tmp_path / "scratch")


def test_both_forms_of_arrow_and_all_splits_below_a_folder(photos, tmp_path):
    faces = sorted(photos.rglob("*.jpg"))
    expected = sorted((path.parent.name, path.read_bytes()) for path in faces)
    table = table_of(faces, TOLD)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=8)
    assert sorted(images(list_source(tmp_path / "file.arrow", scratch=tmp_path / "a"))) == expected
    data = tmp_path / "hub" / "data"
    (tmp_path / "hub" / ".cache").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").touch()
    data.mkdir()
    for name, part in (
        ("train-00000-of-00002", faces[:9]),
        ("train-00001-of-00002", faces[9:20]),
        ("test", faces[20:]),
    ):
        pq.write_table(table_of(part, TOLD), data / f"{name}.parquet")
    assert sorted(images(list_source(tmp_path / "hub", scratch=tmp_path / "b"))) == expected
    for split in ("train", "test"):
        (data / split).mkdir()
        for file in data.glob(f"{split}*.parquet"):
            file.rename(data / split / file.name)
    assert sorted(images(list_source(tmp_path / "hub", scratch=tmp_path / "c"))) == expected
    (tmp_path / "hub" / "loose").mkdir()
    (tmp_path / "hub" / "loose" / "1.jpg").write_bytes(faces[0].read_bytes())
    with pytest.raises(UserError, match=r"several kinds of sources, test\.parquet, loose; give the path of one"):
        list_source(tmp_path / "hub", scratch=tmp_path / "c")


def test_images_that_a_table_only_names_lie_beside_it_or_below_the_source(photos, tmp_path):
    faces = sorted(photos.rglob("*.jpg"))
    source, outside = tmp_path / "set", tmp_path / "secret.jpg"
    (source / "data").mkdir(parents=True)
    outside.write_bytes(faces[0].read_bytes())
    for path in faces:
        folder = source / ("data/faces" if path.parent.name < "person3" else "more")
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (source / "more" / "link.jpg").symlink_to(outside)
    rows = [(str(path.relative_to(source / "data")), path.parent.name) for path in source.glob("data/*/*/*.jpg")]
    rows += [(str(path.relative_to(source)), path.parent.name) for path in source.glob("more/*/*.jpg")]
    rows[0] = (str((source / "data" / rows[0][0]).resolve()), rows[0][1])  # absolute, but inside
    bad = {
        "../../secret.jpg": "its path leads out of the source",
        str(outside): "its path leads out of the source",
        "/etc/passwd": "its path leads out of the source",
        "more/link.jpg": "its path leads out of the source",
        "more/none.jpg": "No such file or directory",
        "more": "No such file or directory",
        "a\0.jpg": "no path",
        "x" * 500: "no path",
    }
    rows += [(path, "person0") for path in bad]
    cells = {
        "image": [{"bytes": None, "path": path} for path, _ in rows],
        "file_name": [path for path, _ in rows],
    }
    for name, column in cells.items():
        table = pa.table({name: column, "identity": [who for _, who in rows]})
        pq.write_table(table, source / "data" / "train.parquet")
        listing = list_source(source, scratch=tmp_path / name)
        assert sorted(images(listing)) == sorted((path.parent.name, path.read_bytes()) for path in faces)
        assert dict(listing.lost) == bad
    manifest = ingest(source, tmp_path / "shards", on_ray=False)
    assert (manifest.images, sum(manifest.rejects.values())) == (30, len(bad))


def test_a_number_that_stands_for_no_class_is_counted(photos, tmp_path):
    """Hugging Face's test splits have the label -1 where it is secret."""
    faces = sorted(photos.rglob("*.jpg"))
    table = table_of(faces, TOLD)
    labels = table["label"].to_pylist()
    labels[-3:] = [-1, -1, 6]
    pq.write_table(table.set_column(1, "label", pa.array(labels)), tmp_path / "a.parquet")
    manifest = ingest(tmp_path / "a.parquet", tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.rejects) == (27, {"no identity": 3})


def test_damaged_exports_end_in_one_line(photos, tmp_path):
    faces = sorted(photos.rglob("*.jpg"))
    folder = save_to_disk(tmp_path / "a", [table_of(faces)], {})
    file = folder / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    ends = []
    with pa.BufferReader(whole) as stream:
        reader = pa.ipc.open_stream(stream)
        for _ in reader:
            ends.append(stream.tell())
    for size in (0, 3, 400, ends[2], ends[2] + 9, len(whole) - 8, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: not a readable Arrow file: ") as caught:
            list_source(folder, scratch=tmp_path / "scratch")
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: .*No such file"):
        list_source(folder, scratch=tmp_path / "scratch")
    for text in ("no json", "[]", '{"_data_files": 3}', '{"_data_files": ["../../x.arrow"]}', '{"_data_files": [{}]}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json: not a file of Hugging Face's save_to_disk"):
            list_source(folder, scratch=tmp_path / "scratch")
    (folder / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(UserError, match=r"save dataset\.flatten_indices"):
        list_source(folder, scratch=tmp_path / "scratch")


def test_offsets_that_lead_out_of_a_batch_are_refused(tmp_path):
    """Arrow does not check them; to read them would end the process."""
    table = pa.table({"image": [b"x" * 900] * 8, "label": np.arange(8) % 2})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    offsets = struct.pack("<9i", *range(0, 7201, 900))
    wild = struct.pack("<9i", *range(0, 6301, 900), 2**31 - 1)
    assert data.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, wild))
    with pytest.raises(UserError, match=r"a\.arrow: not a readable Arrow file"):
        list_source(tmp_path / "a.arrow", scratch=tmp_path / "scratch")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array([[1, 2]] * 4), "label": [1, 1, 2, 2]}, "column image holds list<.*>, not encoded images"),
        ({"image": pa.nulls(4), "label": [1, 1, 2, 2]}, "column image holds null, not encoded images"),
        ({"image": [b"x"] * 4, "label": pa.nulls(4)}, "column label holds null, not numbers or names"),
        ({"image": [b"x"] * 4, "label": [[1]] * 4}, "column label holds list<.*>, not numbers or names"),
        ({"image": pa.array([None] * 4, pa.binary()), "label": [1, 1, 2, 2]}, "holds no images; a:0: no image"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_that_hold_something_else(tmp_path, columns, message, suffix):
    table = pa.table(columns)
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(UserError, match=rf"a\.{suffix}: {message}".replace("a:0", rf"a\.{suffix}:0")):
        list_source(tmp_path / f"a.{suffix}", scratch=tmp_path / "scratch")


def test_a_table_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fr_core.data.arrow.BOMB_SIZE", 2**20)
    pq.write_table(pa.table({"image": [bytes(10**5)] * 900, "label": np.arange(900) % 7}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10**4
    with pytest.raises(UserError, match=r"a\.parquet: unpacks to more than 100 times its size; no table of images"):
        list_source(tmp_path / "a.parquet", scratch=tmp_path / "scratch")
    assert (tmp_path / "scratch" / "00000.images").stat().st_size < 3 * 10**6


def test_identities_of_other_types(tmp_path):
    faces = [b"a", b"b", b"c", b"d"]
    for identities, names in (
        (pa.array(["x", "x", "y", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([b"x", b"x", b"y", b"y"]), ["x", "y"]),
        (pa.array([7, 7, 8, 8], pa.uint8()), ["7", "8"]),
    ):
        pq.write_table(pa.table({"image": faces, "label": identities}), tmp_path / "a.parquet")
        assert list_source(tmp_path / "a.parquet", scratch=tmp_path / "scratch").names == names


def test_images_as_text_and_several_columns_of_names(photos, tmp_path):
    faces = [path.read_bytes() for path in sorted(photos.glob("*/*.jpg"))[:4]]
    texts = [base64.b64encode(face * 3).decode() for face in faces]
    pq.write_table(pa.table({"image": texts, "label": [0, 0, 1, 1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"holds no images; a\.parquet:0: a text that is no path: decode it to bytes$"):
        list_source(tmp_path / "a.parquet", scratch=tmp_path / "scratch")
    columns = {"image": faces, "label": [0.0, 0.0, 1.0, 1.0], "name": ["a", "b", "a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    for _ in ("unpacked", "used again"):
        listing = list_source(tmp_path / "b.parquet", scratch=tmp_path / "scratch")
        assert listing.names == ["0", "1"]
        assert listing.notes == ("people are the column label, not name: rename the right one to identity",)
