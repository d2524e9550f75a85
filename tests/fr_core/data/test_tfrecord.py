import struct

import pytest

from fr_core.data.sources import list_source
from fr_core.data.tfrecord import masked_crc, read_example
from fr_core.errors import UserError
from pipelines.datasets.ingest import ingest
from tests.helpers.containers import example, labelled_images, proto, tf_record, write_tfrecord

IMAGES = [(b"jpeg" * (40 * i + 1), i // 3) for i in range(9)]
EXPECTED = sorted((str(label), image) for image, label in IMAGES)


def test_the_checksum_is_crc_32c():
    """The check value of CRC-32C is 0xE3069283; TFRecord rotates it and adds a constant."""
    crc = 0xE3069283
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


FORMS = {
    "label": lambda image, label: example(image=image, label=label),
    "not packed": lambda image, label: example(packed=False, label=label, image=image),
    "label as text": lambda image, label: example(image_raw=image, label=str(label).encode()),
    "arcface-tf2": lambda image, label: example(
        image__source_id=label, image__filename=b"a.jpg", image__encoded=image, image__quality=0.5
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_examples_with_labels(tmp_path, form):
    examples = [FORMS[form](image, label) for image, label in IMAGES]
    write_tfrecord(tmp_path / "train.tfrecord-00000-of-00002", examples[:4])
    write_tfrecord(tmp_path / "train.tfrecord-00001-of-00002", examples[4:])
    assert labelled_images(list_source(tmp_path)) == EXPECTED
    whole = write_tfrecord(tmp_path / "all" / "a.tfrecord", examples)
    listing = list_source(tmp_path / "all" / "a.tfrecord")
    assert labelled_images(listing) == EXPECTED
    assert listing.lost == ()
    assert set(listing.paths) == ({"a.jpg"} if form == "arcface-tf2" else {f"a.tfrecord:{start}" for start in whole})


def test_negative_labels_are_names_too(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", [example(image=image, label=-label) for image, label in IMAGES])
    assert list_source(tmp_path / "a.tfrecord").names == ["-1", "-2", "0"]


@pytest.fixture
def tface(tmp_path):
    """TFace's set in two files, the index that its writer leaves, and a training list without the last image."""
    folder = tmp_path / "data" / "TFR-MS1M"
    images = [example(image=image) for image, _ in IMAGES]
    starts = [write_tfrecord(folder / f"TFR-MS1M-{i:05d}.tfrecord", images[i * 5 : i * 5 + 5]) for i in range(2)]
    places = [(i, start) for i in range(2) for start in starts[i]]
    (folder / "TFR-MS1M.index").write_text(
        "".join(f"/raw/m.{IMAGES[n][1]}/{n}.jpg\t{i}\t{start}\n" for n, (i, start) in enumerate(places))
    )
    (tmp_path / "ms1m.txt").write_text(
        "".join(f"TFR-MS1M\t{i}\t{start}\t{IMAGES[n][1]}\n" for n, (i, start) in enumerate(places[:-1]))
    )
    return tmp_path


def test_tfaces_training_list(tface):
    expected = sorted((str(label), image) for image, label in IMAGES[:-1])
    for root in (tface / "data", tface / "data" / "TFR-MS1M"):
        assert labelled_images(list_source(root, tface / "ms1m.txt")) == expected
    (tface / "data" / "ms1m.txt").write_bytes((tface / "ms1m.txt").read_bytes())
    assert labelled_images(list_source(tface / "data" / "ms1m.txt")) == expected


def test_tfaces_index_names_people_by_folders(tface):
    listing = list_source(tface / "data" / "TFR-MS1M")
    assert labelled_images(listing) == sorted((f"m.{label}", image) for image, label in IMAGES)
    assert listing.paths[0] == "/raw/m.0/0.jpg"
    (tface / "data" / "TFR-MS1M" / "TFR-MS1M.index").unlink()
    with pytest.raises(UserError, match=r"no images: .*: no label in its record; .*TFace's list: --labels LIST"):
        list_source(tface / "data" / "TFR-MS1M")


def test_a_set_that_was_cut_off_is_counted(photos, tmp_path):
    """With a list every image is known; without one, that the last record is not whole."""
    faces = sorted(photos.rglob("*.jpg"))
    examples = [example(image=path.read_bytes(), label=int(path.parent.name[-1])) for path in faces]
    path = tmp_path / "TFR" / "TFR-00000.tfrecord"
    starts = write_tfrecord(path, examples)
    rows = [f"TFR\t0\t{start}\t{faces[i].parent.name[-1]}\n" for i, start in enumerate(starts)]
    (tmp_path / "list.txt").write_text("".join(rows))
    path.write_bytes(path.read_bytes()[: starts[20] + 100])
    manifest = ingest(tmp_path / "list.txt", tmp_path / "a", on_ray=False)
    assert (manifest.images, manifest.rejects) == (20, {"the file ends inside a record": 10})
    manifest = ingest(path, tmp_path / "b", on_ray=False)
    assert (manifest.images, manifest.rejects) == (20, {"the file ends inside a record": 1})
    (tmp_path / "list.txt").write_text("".join([*rows[:20], "TFR\t0\t77\t1\n"]))
    manifest = ingest(tmp_path / "list.txt", tmp_path / "c", on_ray=False)
    assert (manifest.images, manifest.rejects) == (20, {"no record at its place": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("TFR-MS1M\t0\tx\t1", "line 9: expected NAME, FILE, OFFSET and LABEL with tabs between them"),
        ("TFR-MS1M\t0\t1", "line 9: expected"),
        ("../data/TFR-MS1M\t0\t0\t1", "line 9: expected"),
        ("..\t0\t0\t1", "line 9: expected"),
        ("TFR-MS1M\t7\t0\t1", r"TFR-MS1M-00007\.tfrecord is missing; give the folder that holds TFR-MS1M/"),
        ("x" * 5000 + "\t0\t0\t1", "line 9: expected"),
        ("TFR-MS1M\t" + "9" * 5000 + "\t0\t1", "line 9: expected"),
    ],
)
def test_bad_lists_name_the_line(tface, row, message):
    table = tface / "ms1m.txt"
    table.write_text(table.read_text() + row + "\n")
    with pytest.raises(UserError, match=rf"ms1m\.txt: .*{message}") as caught:
        list_source(tface / "data", table)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_whole_tfrecord(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path, [example(image=image, label=label) for image, label in IMAGES])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(tf_record(example(image=IMAGES[0][0], label=0)))] ^= 1
    huge = struct.pack("<Q", 2**63) + struct.pack("<I", masked_crc(struct.pack("<Q", 2**63)))
    for data, message in (
        (b"", "no images: a.tfrecord: no records"),
        (b"no tfrecord" * 9, "no record at byte 0; not TFRecord, or damaged: copy the file again"),
        (bytes(damaged), r"no record at byte \d\d; not TFRecord"),
        (b"\x1f\x8b\x08" + bytes(90), "compressed by gzip; decompress it first"),
        (b"\x78\x9c" + bytes(90), "compressed by zlib; decompress it first"),
        (huge + bytes(90), "the file ends inside a record"),
        (tf_record(b"\xff" * 40), "no label in its record"),
        (tf_record(example(label=1)), "no image in its record"),
        (tf_record(example(image=1, label=1)), "no image in its record"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.tfrecord: .*{message}") as caught:
            list_source(path)
        assert "\n" not in str(caught.value)


def test_damaged_examples():
    for data in (b"\x0a", b"\x0a\x05abc", b"\xff" * 11, proto(1, b"\x0a\xff\xff\xff\xff\x7f"), b"\x0b", b"\x0d\0"):
        with pytest.raises(ValueError, match="damaged"):
            read_example(data)
    assert read_example(example(image=b"a", label=7))["label"] == 7
    assert read_example(proto(1, 3) + proto(2, b"x")) == {}
