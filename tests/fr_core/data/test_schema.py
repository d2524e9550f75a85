import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from fr_core.data.schema import Dataset, _open_parquet, grouped_table, open_dataset, write_shard
from fr_core.errors import UserError
from tests.helpers.datasets import put, write_dataset
from tests.helpers.embeddings import embedded


@pytest.fixture
def copy(dataset, tmp_path):
    _open_parquet.cache_clear()
    return shutil.copytree(dataset, tmp_path / "shards")


def test_row_groups_and_names(dataset):
    opened = open_dataset(dataset)
    assert opened.row_groups.tolist()[:5] == [[0, 0, 128], [0, 1, 128], [0, 2, 128], [0, 3, 116], [1, 0, 128]]
    assert opened.row_groups[:, 2].sum() == opened.manifest.images == 1500
    assert opened.identity_names()[:2] == ["id0", "id1"]
    opened.check_sha256()


def test_row_groups_are_numbered_shard_by_shard(dataset):
    """Also where shards have different numbers of them, or there is no shard."""
    opened, sizes = open_dataset(dataset), [(5, 3), (), (7,), (1, 1, 1)]
    shards = [opened.manifest.shards[0].model_copy(update={"row_groups": groups}) for groups in sizes]
    made = Dataset(opened.root, opened.manifest.model_copy(update={"shards": tuple(shards)}))
    assert made.row_groups.tolist() == [[s, g, n] for s, groups in enumerate(sizes) for g, n in enumerate(groups)]
    assert made.row_groups.dtype == np.int64
    none = Dataset(opened.root, opened.manifest.model_copy(update={"shards": ()}))
    assert none.row_groups.shape == (0, 3)


def test_truncated_shard_is_named_on_opening(copy):
    shard = copy / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"shard-00001\.parquet.*truncated"):
        open_dataset(copy)


def test_missing_shard_is_named(copy):
    (copy / "shard-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.parquet is missing"):
        open_dataset(copy)


def test_a_shard_that_was_replaced_since_is_refused(copy, tmp_path):
    opened = open_dataset(copy)
    opened.read_row_group(0, 0)
    write_dataset(tmp_path / "other", 700, 30)
    shutil.copy(tmp_path / "other" / "shard-00001.parquet", copy / "shard-00001.parquet")
    with pytest.raises(UserError, match=r"shard-00001\.parquet is damaged: \d+ bytes, \d+ when the dataset was opened"):
        opened.read_row_group(1, 0)


def test_flipped_byte_is_found_by_checksum_and_by_reading(copy):
    shard = copy / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    shard.write_bytes(bytes(data))
    opened = open_dataset(copy)
    with pytest.raises(UserError, match=r"shard-00000\.parquet: wrong checksum"):
        opened.check_sha256()

    def read_all():
        for group in range(4):
            opened.read_row_group(0, group)

    with pytest.raises(UserError, match=r"shard-00000\.parquet is damaged"):
        read_all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"schema_version": 99}, "schema version 99"),
        (lambda m: m | {"surprise": 1}, "not a manifest"),
        (lambda m: m | {"shards": [m["shards"][0] | {"file": "../../etc/passwd"}]}, "is missing"),
        (lambda m: [1, 2], "not a manifest"),
    ],
)
def test_bad_manifests_are_refused(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        open_dataset(copy)


def test_no_manifest_names_the_command(tmp_path):
    with pytest.raises(UserError, match="bigface ingest"):
        open_dataset(tmp_path)


def test_grouped_shards_hold_whole_chunks(tmp_path):
    points = np.arange(10, dtype=np.float32).reshape(5, 2)
    chunks = [[(0, 7, b"a", points), (1, 7, b"b", None)], [(5, 9, b"c", points)]]
    shard = write_shard(tmp_path / "shard-00000.parquet", grouped_table(chunks), "grouped")
    rows = pq.read_table(tmp_path / shard.file).to_pylist()
    assert shard.images == 3
    assert [(r["label"], r["sample_ids"], r["images"]) for r in rows] == [(7, [0, 1], [b"a", b"b"]), (9, [5], [b"c"])]
    assert rows[0]["landmarks"] == [points.ravel().tolist(), None]


def refusal(root):
    with pytest.raises(UserError) as caught:
        open_dataset(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_split_left_names_its_training_shards(dataset, tmp_path):
    folder = tmp_path / "held out"
    shutil.copytree(dataset, folder / "train")
    (folder / "verify" / "images").mkdir(parents=True)
    assert refusal(folder) == f"{folder} is no dataset, but {folder}/train is: give that path"


def test_photos_in_place_of_shards_name_the_command(photos, tmp_path):
    def mend(place, source):
        command = f"bigface ingest {source} --out shards"
        return f"{place} holds photos, not shards: run {command} first, then give the folder shards"

    assert refusal(photos) == mend(photos, photos)
    assert refusal(photos / "person0") == mend(photos / "person0", photos / "person0")  # loose
    drawn = tmp_path / "drawn"  # as bigface synth leaves them
    shutil.copytree(photos, drawn / "images")
    (drawn / "landmarks.csv").touch()
    assert refusal(drawn) == mend(drawn, drawn / "images")
    for name in ("a.zip", "a.tar", "a.tar.gz", "train.rec", "faces.parquet"):
        folder = tmp_path / f"the {name}"
        folder.mkdir()
        (folder / name).touch()
        assert refusal(folder) == mend(folder, f"'{folder}'")
        assert refusal(folder / name) == mend(folder / name, f"'{folder / name}'")


def test_paths_with_nothing_to_train_on_say_so(copy, tmp_path):
    absent, empty = tmp_path / "no where", tmp_path / "empty"
    empty.mkdir()
    command = "make shards with: bigface ingest PHOTOS --out"
    assert refusal(absent) == f"{absent}: no such folder; correct the path, or {command} '{absent}'"
    assert refusal(empty) == f"{empty}: the folder is empty; correct the path, or {command} {empty}"
    file = copy / "shard-00000.parquet"
    assert refusal(file) == f"{file} is a file of a dataset: give its folder: {copy}"
    (tmp_path / "notes").touch()
    assert "is a file, but a dataset is a folder: give the folder that holds manifest.json" in refusal(
        tmp_path / "notes"
    )
    (copy / "manifest.json").unlink()
    assert "no manifest.json beside the shards, so they are unfinished: run their bigface command" in refusal(copy)


def test_plots_in_a_folder_of_runs_are_no_photos(dataset, tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    for name in ("curves.png", "metrics.csv", "report.json"):
        (run / name).touch()
    for root in (run, run.parent):
        assert refusal(root).startswith(f"{root}: no manifest.json; correct the path, or make shards")
    embedded(tmp_path / "e", open_dataset(dataset))
    assert "holds embeddings: give the folder of the shards" in refusal(tmp_path / "e")


def test_a_wrong_url_is_told_as_a_wrong_folder_is(bucket, photos):
    assert f"{bucket}/nothing: no such folder" in refusal(bucket / "nothing").replace(f"?{bucket.query}", "")
    put(photos, bucket / "people")
    assert "holds photos, not shards: run bigface ingest " in refusal(bucket / "people")
