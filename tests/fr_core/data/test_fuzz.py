"""Files that nobody wrote: whatever is changed in them, they are read or refused, and nothing else happens.

``make fuzz`` runs the same with 10,000 cases each.
"""

import contextlib
import json
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.data.archives import tar_members, zip_members
from fr_core.data.listing import read_image
from fr_core.data.photos import RejectedImage
from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from tests.helpers.containers import example, msgpack_entries, proto, save_to_disk, write_lmdb, write_tfrecord
from tests.helpers.packed import make_tar, make_zip, payload, write_rec

pytestmark = pytest.mark.fuzz
FILES = {f"{person}/{shot}.jpg": bytes([shot]) * (300 * shot + 5) for person in "abc" for shot in range(3)}


@st.composite
def changes(draw):
    """A function that changes some bytes of a file, cuts a piece out of it, or ends it early."""
    edits = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6))
    cut = draw(st.none() | st.tuples(st.floats(0, 1), st.integers(1, 600)))
    end = draw(st.none() | st.floats(0, 1))

    def apply(data):
        data = bytearray(data)
        for place, value in edits:
            data[int(place * len(data))] = value
        if cut:
            begin = int(cut[0] * len(data))
            del data[begin : begin + cut[1]]
        return bytes(data if end is None else data[: int(end * len(data))])

    return apply


def read_all(path, labels=None):
    """Lists a source and reads every image of it; what is found is bytes of no more than the file can hold."""
    with contextlib.suppress(UserError):
        listing = list_source(path, labels, path.parent / "scratch")
        for row in listing.images.to_pylist():
            with contextlib.suppress(RejectedImage):
                file = listing.files[row["file"]]
                data = read_image(listing.kind, file, row["path"], row["start"], row["length"])
                assert len(data) <= 4 * sum(map(len, FILES.values())) + 10_000


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    make_zip(root / "deflated.zip", FILES)
    make_zip(root / "stored.zip", FILES, 0)
    make_tar(root / "a.tar", FILES)
    write_rec(root / "a.rec", [payload(data, float(ord(name[0])), i) for i, (name, data) in enumerate(FILES.items())])
    labels = {"a": 0, "b": 1, "c": 2}
    images = [(data, labels[name[0]]) for name, data in FILES.items()]
    write_lmdb(root / "msgpack.lmdb", msgpack_entries(images))
    write_lmdb(root / "pickle.lmdb", {b"%d" % i: pickle.dumps(pair) for i, pair in enumerate(images)}, commits=3)
    datums = [proto(4, b"\xff\xd8\xff" + data) + proto(5, label) + proto(7, 1) for data, label in images]
    write_lmdb(root / "datum.lmdb", {b"casia_%d" % i: value for i, value in enumerate(datums)})
    starts = write_tfrecord(root / "a.tfrecord", [example(image=data, label=label) for data, label in images])
    write_tfrecord(root / "T-00000.tfrecord", [example(label=label, image=data) for data, label in images])
    rows = zip(starts, images, strict=True)
    (root / "list.txt").write_text("".join(f"T\t0\t{start}\t{label}\n" for start, (_, label) in rows))
    told = {"info": {"features": {"label": {"names": [*labels], "_type": "ClassLabel"}}}}
    cells = [{"bytes": data, "path": f"{i}.jpg"} for i, (data, _) in enumerate(images)]
    table = pa.table({"image": cells, "label": [label for _, label in images]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, root / "a.parquet", row_group_size=4)
    save_to_disk(root / "saved", [table], {})
    with pa.ipc.new_file(root / "file.arrow", table.schema) as file:
        file.write_table(table)
    return root


@given(change=changes(), name=st.sampled_from(["deflated.zip", "stored.zip", "a.tar"]))
def test_archives(originals, tmp_path_factory, change, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes(), of_index=st.booleans(), index=st.booleans())
def test_recordio(originals, tmp_path_factory, change, of_index, index):
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("a.rec", "a.idx") if index else ("a.rec",):
        data = (originals / name).read_bytes()
        (root / name).write_bytes(change(data) if of_index == (name == "a.idx") else data)
    read_all(root / "a.rec")


@given(change=changes(), name=st.sampled_from(["msgpack.lmdb", "pickle.lmdb", "datum.lmdb"]))
def test_lmdb(originals, tmp_path_factory, change, name):
    path = tmp_path_factory.mktemp("fuzz") / "a.lmdb"
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@st.composite
def page_changes(draw):
    """A function that changes words of an LMDB that lead to other places: in the heads of pages and in their nodes."""
    places = st.tuples(st.integers(0, 30), st.sampled_from([*range(0, 200, 2), *range(3900, 4096, 2)]))
    edits = draw(st.lists(st.tuples(places, st.integers(0, 2**16 - 1) | st.integers(0, 40)), min_size=1, max_size=6))

    def apply(data):
        data = bytearray(data)
        for (page, offset), value in edits:
            at = page % (len(data) // 4096) * 4096 + offset
            data[at : at + 2] = value.to_bytes(2, "little")
        return bytes(data)

    return apply


@given(change=page_changes(), name=st.sampled_from(["msgpack.lmdb", "pickle.lmdb", "datum.lmdb"]))
def test_pages_of_lmdb(originals, tmp_path_factory, change, name):
    path = tmp_path_factory.mktemp("fuzz") / "a.lmdb"
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes())
def test_tfrecord(originals, tmp_path_factory, change):
    path = tmp_path_factory.mktemp("fuzz") / "a.tfrecord"
    path.write_bytes(change((originals / "a.tfrecord").read_bytes()))
    read_all(path)


@given(data=st.binary(max_size=200), change=changes())
def test_examples_in_tfrecord(tmp_path_factory, data, change):
    """Whole records of changed Examples."""
    path = tmp_path_factory.mktemp("fuzz") / "a.tfrecord"
    write_tfrecord(path, [change(example(label=i // 2, image=b"image" * i)) for i in range(4)] + [data])
    read_all(path)


@given(change=changes(), of_list=st.booleans())
def test_tface_lists(originals, tmp_path_factory, change, of_list):
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("T-00000.tfrecord", "list.txt"):
        data = (originals / name).read_bytes()
        (root / name).write_bytes(change(data) if of_list == (name == "list.txt") else data)
    read_all(root, root / "list.txt")


@given(change=changes(), name=st.sampled_from(["a.parquet", "file.arrow", "saved/data-00000-of-00001.arrow"]))
def test_tables(originals, tmp_path_factory, change, name):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{name.rpartition('.')[2]}"
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes(), name=st.sampled_from(["state.json", "dataset_info.json"]))
def test_files_of_save_to_disk(originals, tmp_path_factory, change, name):
    root = tmp_path_factory.mktemp("fuzz") / "saved"
    root.mkdir()
    for file in (originals / "saved").iterdir():
        (root / file.name).write_bytes(change(file.read_bytes()) if file.name == name else file.read_bytes())
    read_all(root)


SUFFIXES = ["zip", "tar", "rec", "csv", "txt", "tsv", "lmdb", "tfrecord", "parquet", "arrow"]


@given(data=st.binary(max_size=400), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    path.write_bytes(data)
    read_all(path)


@given(change=changes())
def test_manifests(dataset, tmp_path_factory, change):
    root = tmp_path_factory.mktemp("fuzz")
    for file in dataset.iterdir():
        (root / file.name).symlink_to(file)
    manifest = root / "manifest.json"
    manifest.unlink()
    manifest.write_bytes(change((dataset / "manifest.json").read_bytes()))
    with contextlib.suppress(UserError):
        opened = open_dataset(root)
        assert all("/" not in shard.file for shard in opened.manifest.shards)
        assert json.loads(manifest.read_text())


def test_names_that_lead_outside_are_only_names(tmp_path):
    files = {"../../evil/1.jpg": b"a", "../../evil/2.jpg": b"b", "/etc/x/1.jpg": b"c", "ok/1.jpg": b"d"}
    for path in (make_zip(tmp_path / "a.zip", files), make_tar(tmp_path / "b.tar", files)):
        read_all(path)
        members = zip_members(path) if path.suffix == ".zip" else tar_members(path)
        assert {member.name for member in members} == set(files)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zip", "b.tar"]


def test_links_and_devices_in_a_tar_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a/1.jpg"), (tarfile.LNKTYPE, "a/2.jpg"), (tarfile.CHRTYPE, "b/1.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert not list(tar_members(tmp_path / "a.tar"))
