"""Files that nobody wrote: whatever is changed in them, they are read or refused, and nothing else happens.

``make fuzz`` runs the same with 10,000 cases each.
"""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.data.archives import tar_members, zip_members
from fr_core.data.hub import split_hub_url
from fr_core.data.labels import read_labels
from fr_core.data.landmarks import LANDMARK_COLUMNS, match_landmarks, read_landmarks
from fr_core.data.listing import read_image
from fr_core.data.photos import RejectedImage
from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_folder, list_source
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
    for name, data in FILES.items():
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(data)
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
    save_to_disk(root / "saved", [table.take([0, 1, 3, 4])], {})
    with pa.ipc.new_file(root / "file.arrow", table.schema) as file:
        file.write_table(table)
    return root


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Makes an empty folder and removes the one before; pytest's own would look at all of them for each new one."""
    root = tmp_path_factory.mktemp("fuzz")
    numbers = itertools.count()

    def make():
        number = next(numbers)
        shutil.rmtree(root / str(number - 1), ignore_errors=True)
        (root / str(number)).mkdir()
        return root / str(number)

    return make


@given(change=changes(), name=st.sampled_from(["deflated.zip", "stored.zip", "a.tar"]))
def test_archives(originals, fresh, change, name):
    path = fresh() / name
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes(), of_index=st.booleans(), index=st.booleans())
def test_recordio(originals, fresh, change, of_index, index):
    root = fresh()
    for name in ("a.rec", "a.idx") if index else ("a.rec",):
        data = (originals / name).read_bytes()
        (root / name).write_bytes(change(data) if of_index == (name == "a.idx") else data)
    read_all(root / "a.rec")


@given(change=changes(), name=st.sampled_from(["msgpack.lmdb", "pickle.lmdb", "datum.lmdb"]))
def test_lmdb(originals, fresh, change, name):
    path = fresh() / "a.lmdb"
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
def test_pages_of_lmdb(originals, fresh, change, name):
    path = fresh() / "a.lmdb"
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes())
def test_tfrecord(originals, fresh, change):
    path = fresh() / "a.tfrecord"
    path.write_bytes(change((originals / "a.tfrecord").read_bytes()))
    read_all(path)


@given(data=st.binary(max_size=200), change=changes())
def test_examples_in_tfrecord(fresh, data, change):
    """Whole records of changed Examples."""
    path = fresh() / "a.tfrecord"
    write_tfrecord(path, [change(example(label=i // 2, image=b"image" * i)) for i in range(4)] + [data])
    read_all(path)


@given(change=changes(), of_list=st.booleans())
def test_tface_lists(originals, fresh, change, of_list):
    root = fresh()
    for name in ("T-00000.tfrecord", "list.txt"):
        data = (originals / name).read_bytes()
        (root / name).write_bytes(change(data) if of_list == (name == "list.txt") else data)
    read_all(root, root / "list.txt")


@given(change=changes(), name=st.sampled_from(["a.parquet", "file.arrow", "saved/data-00000-of-00001.arrow"]))
def test_tables(originals, fresh, change, name):
    path = fresh() / f"a.{name.rpartition('.')[2]}"
    path.write_bytes(change((originals / name).read_bytes()))
    read_all(path)


@given(change=changes(), name=st.sampled_from(["state.json", "dataset_info.json"]))
def test_files_of_save_to_disk(originals, fresh, change, name):
    root = fresh() / "saved"
    root.mkdir()
    for file in (originals / "saved").iterdir():
        if file.name == name:
            (root / name).write_bytes(change(file.read_bytes()))
        else:
            (root / file.name).symlink_to(file)
    read_all(root)


SUFFIXES = ["zip", "tar", "rec", "csv", "txt", "tsv", "lmdb", "tfrecord", "parquet", "arrow"]


@given(data=st.binary(max_size=400), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes(fresh, data, suffix):
    path = fresh() / f"a.{suffix}"
    path.write_bytes(data)
    read_all(path)


NAMES = st.text("ab.@ \\né\udc80", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
FOLDER_NAMES = NAMES | st.sampled_from(["train", "val", ".git", "@eaDir", "Trash"])
FILE_NAMES = NAMES | st.sampled_from(
    ["0.jpg", "1.JPG", "a.zip", "a.rec", "a.parquet", "data.mdb", "a.tfrecord", "a.tar.gz"]
)
TREES = st.lists(st.tuples(st.lists(FOLDER_NAMES, max_size=4), FILE_NAMES), max_size=12)


@given(tree=TREES, level=st.none() | st.integers(1, 3))
def test_folders(fresh, tree, level):
    """Every file below a folder becomes an image or is counted."""
    root = fresh() / "people"
    root.mkdir()
    for folders, name in tree:
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            root.joinpath(*folders).mkdir(parents=True, exist_ok=True)
            root.joinpath(*folders, name).write_bytes(b"face")
    with contextlib.suppress(UserError):
        list_source(root, scratch=root.parent / "scratch")
    with contextlib.suppress(UserError):
        listing = list_folder(root, level)
        files = sum(len(names) for _, _, names in os.walk(root))
        assert len(listing.paths) + sum(listing.passed.values()) == files


PEOPLE = [(f"{person}/{shot}.jpg", person, shot) for person in "abc" for shot in range(3)]
LISTS = [
    "".join(f"{path} {ord(person)}\n" for path, person, _ in PEOPLE),
    "".join(f"{i}\t{ord(person)}.000\t{path}\n" for i, (path, person, _) in enumerate(PEOPLE)),
    "\ufeffpath;label\n" + "".join(f"/data/{path};{person}\n" for path, person, _ in PEOPLE),
    "label,file_name,box\n" + "".join(f'{person},"{path}",1\n' for path, person, _ in PEOPLE),
    "".join(f"{person}\\{shot}.jpg 0 {ord(person)} 0\n" for _, person, shot in PEOPLE),
]


@given(change=changes(), text=st.sampled_from(LISTS))
def test_lists_of_labels(originals, fresh, change, text):
    path = fresh() / "list.txt"
    path.write_bytes(change(text.encode()))
    with contextlib.suppress(UserError):
        assert all(name and who for name, who in read_labels(path))
        listing = list_source(originals / "photos", path)
        assert len(listing.paths) <= len(text.splitlines())


RECORD_LISTS = [
    "".join(f"{i}\t{name}\n" for i, (name, _, _) in enumerate(PEOPLE)),
    "".join(f"{i} {person} {name}\n" for i, (name, person, _) in enumerate(PEOPLE)),
]


@given(change=changes(), text=st.sampled_from(RECORD_LISTS))
def test_lists_of_records(originals, fresh, change, text):
    path = fresh() / "list.txt"
    path.write_bytes(change(text.encode()))
    read_all(originals / "a.rec", path)


POINTS = "38.3 51.7 73.5 51.5 56.0 71.7 41.5 92.4 70.7 92.2"
NAMED = ",".join(("path", *LANDMARK_COLUMNS))
LANDMARKS = [
    "".join(f"{path} {POINTS}\n" for path, _, _ in PEOPLE),
    "9\nlefteye_x lefteye_y\n" + "".join(f"{path} 1 {POINTS}\n" for path, _, _ in PEOPLE),
    f"{NAMED}\n" + "".join(f"{path},{POINTS.replace(' ', ',')}\n" for path, _, _ in PEOPLE),
]


@given(change=changes(), text=st.sampled_from(LANDMARKS), more=st.sampled_from(["", "nan", "1e39", "-inf", "1" * 5000]))
def test_landmarks(fresh, change, text, more):
    path = fresh() / "points.txt"
    path.write_bytes(change(text.replace("71.7", more or "71.7", 3).encode()))
    with contextlib.suppress(UserError):
        table = read_landmarks(path)
        points, _ = match_landmarks([name for name, _, _ in PEOPLE], table)
        assert points.shape == (len(PEOPLE), 5, 2)


@given(data=st.data(), suffix=st.sampled_from([".json", ".cls", ".id", ".cls.txt", ".target.cls"]))
def test_webdataset(fresh, data, suffix):
    """A tar whose files beside the images hold anything."""
    numbers = st.integers(0, 2).map(lambda label: b"%d" % label)
    fields = st.dictionaries(
        st.sampled_from(["label", "id", "b"]), st.integers(0, 2) | st.text("ab", max_size=2) | st.none()
    )
    beside = st.binary(max_size=20) | numbers | fields.map(lambda values: json.dumps(values).encode())
    files = {}
    for i in range(data.draw(st.integers(1, 6))):
        files[f"s/{i}.x.jpg"] = b"face" * i
        files[f"s/{i}{data.draw(st.sampled_from(['', '.x']))}{suffix}"] = data.draw(beside)
    path = make_tar(fresh() / "a.tar", files)
    read_all(path)


@given(
    st.text("hf:/@%datse-. \né", max_size=40).map("hf://datasets/".__add__) | st.text(max_size=40).map("hf://".__add__)
)
def test_urls_of_the_hub(url):
    with contextlib.suppress(UserError):
        place, parts = split_hub_url(url)
        assert place.startswith("hf://datasets/")
        assert all(parts)


@given(change=changes())
def test_manifests(dataset, fresh, change):
    root = fresh()
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
