import pickle
import random
import struct

import msgpack
import pytest

from fr_core.data.lmdb import META, read_entries
from fr_core.data.sources import list_source
from fr_core.data.store import LocalBytes
from fr_core.errors import UserError
from pipelines.datasets.ingest import ingest
from tests.helpers.containers import labelled_images, msgpack_entries, proto, write_lmdb

IMAGES = [(b"\xff\xd8\xff" + bytes([i]) * (900 * i + 1), i // 3) for i in range(9)]
EXPECTED = sorted((str(label), image) for image, label in IMAGES)


@pytest.mark.parametrize("commits", [1, 7])
def test_the_tree_is_read_as_the_library_wrote_it(tmp_path, commits):
    """Values of all lengths, in leaves and in pages of their own; deleted ones leave free pages."""
    draw = random.Random(0)
    entries = {b"%d" % i: draw.randbytes(draw.choice([0, 5, 2000, 2040, 4090, 70_000])) for i in range(800)}
    path = write_lmdb(tmp_path / "a.lmdb", entries, commits)
    data = LocalBytes(path)
    found = {entry.key: data[entry.start : entry.start + entry.length] for entry in read_entries(data)}
    assert found == entries
    assert list(found) == sorted(entries)


def datum(image, label):
    return b"".join(proto(i, value) for i, value in ((1, 3), (2, 112), (3, 112), (4, image), (5, label), (7, 1)))


FORMS = {
    "msgpack": msgpack_entries(IMAGES),
    "with an embedding": msgpack_entries(IMAGES, [b"\x93NUMPY" * 90]),
    "a mask behind": {b"%d" % i: msgpack.dumps((image, label, b"mask")) for i, (image, label) in enumerate(IMAGES)},
    "old msgpack": {b"%d" % i: msgpack.dumps(pair, use_bin_type=False) for i, pair in enumerate(IMAGES)},
    "pickled tuple": {b"%d" % i: pickle.dumps(pair) for i, pair in enumerate(IMAGES)} | {b"__keys__": pickle.dumps([])},
    "pickled dict": {
        b"%05d" % i: pickle.dumps({"image": image, "label": str(label)}) for i, (image, label) in enumerate(IMAGES)
    },
    "pickled batch": {b"%d" % i: pickle.dumps(([image], label)) for i, (image, label) in enumerate(IMAGES)},
    "datum": {b"casia_%d" % i: datum(image, label) for i, (image, label) in enumerate(IMAGES)},
    "image alone": {b"faces/%d/%d.jpg" % (label, i): image for i, (image, label) in enumerate(IMAGES)},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_people_publish(tmp_path, form):
    path = write_lmdb(tmp_path / "a.lmdb", FORMS[form])
    for source in (path, tmp_path):
        listing = list_source(source)
        assert labelled_images(listing) == EXPECTED
        assert listing.lost == ()


def test_a_folder_is_an_lmdb_or_holds_one(tmp_path):
    (tmp_path / "sets").mkdir()
    write_lmdb(tmp_path / "sets" / "HSFace.lmdb", FORMS["msgpack"], subdir=True)
    for source in (
        tmp_path / "sets",
        tmp_path / "sets" / "HSFace.lmdb",
        tmp_path / "sets" / "HSFace.lmdb" / "data.mdb",
    ):
        assert labelled_images(list_source(source)) == EXPECTED
    write_lmdb(tmp_path / "sets" / "more.lmdb", FORMS["msgpack"])
    with pytest.raises(UserError, match=r"several kinds of sources, .*; give the path of one"):
        list_source(tmp_path / "sets")


def test_photos_in_an_lmdb_are_ingested_and_what_is_none_is_counted(photos, tmp_path):
    faces = [(path.read_bytes(), int(path.parent.name[-1])) for path in sorted(photos.rglob("*.jpg"))]
    entries = msgpack_entries([*faces, (faces[0][0][:300], 0)])
    entries |= {b"x": b"", b"y": msgpack.dumps((b"", 3)), b"z": msgpack.dumps((faces[0][0], None))}
    manifest = ingest(write_lmdb(tmp_path / "a.lmdb", entries), tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.identities, sum(manifest.rejects.values())) == (30, 6, 4)
    assert manifest.rejects["no image and label in its value"] == 3


class Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return exec, (f"open({str(self.proof)!r}, 'w')",)


def test_a_pickled_program_is_refused_and_does_not_run(tmp_path):
    values = {b"%d" % i: pickle.dumps((image, Evil(tmp_path / "ran"))) for i, (image, _) in enumerate(IMAGES)}
    with pytest.raises(UserError, match=r"a\.lmdb: no images; entry 0 has none: it would run"):
        list_source(write_lmdb(tmp_path / "a.lmdb", values))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "entry 0 has none: another form"),
        (b"what is this", "entry 0 has none: "),
        (b"\xff\xd8\xff jpeg", "an image without a label"),
        (msgpack.dumps([b"image"]), "no bytes and label"),
        (msgpack.dumps({"image": None, "label": 3}), "no bytes and label"),
        (pickle.dumps((b"\xff\xd8\xff", 3), 2), "a pickle of before protocol 3"),
        (
            proto(1, 3) + proto(4, bytes(99)) + proto(5, 3),
            "a Datum of raw pixels; write it with convert_imageset --enc",
        ),
        (b"\x80\x04" + b"(" * 900, "entry 0 has none: "),
        (b"\xdd" + b"\xff" * 4, "entry 0 has none: "),  # four thousand million items
        (b"\x91" * 2000 + b"\x01", "entry 0 has none: "),
    ],
)
def test_foreign_values_are_named(tmp_path, value, message):
    with pytest.raises(UserError, match=rf"a\.lmdb: no images; .*{message}.*; values must be msgpack") as caught:
        list_source(write_lmdb(tmp_path / "a.lmdb", {b"0": value, b"1": value}))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_whole_lmdb(tmp_path):
    path = write_lmdb(tmp_path / "a.lmdb", FORMS["msgpack"])
    whole = path.read_bytes()
    meta, loop = bytearray(whole), bytearray(whole)
    for start in (16, 4096 + 16):
        meta[start + 4] = 2
        loop[META.unpack_from(whole, start)[4] * 4096 + 10] = 1  # a leaf that says it is a branch
    for data, message in (
        (b"", "the file is empty"),
        (b"no lmdb" * 2000, "no LMDB"),
        (whole[:4096], "cut off"),
        (whole[: len(whole) // 2], "cut off"),
        (bytes(meta), "its version is 2, not 1"),
        (bytes(loop), "copy the file again"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.lmdb: not a readable LMDB: .*{message}"):
            list_source(path)
    with pytest.raises(UserError, match="no images; it has no entries"):
        list_source(write_lmdb(tmp_path / "b.lmdb", {}))


def test_every_cut_and_every_wild_page_number_ends_in_one_line(tmp_path):
    """The C library would read behind the map and end the process. Pages at the end may be free: then all is there."""
    path = write_lmdb(tmp_path / "a.lmdb", FORMS["msgpack"])
    whole = path.read_bytes()
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        try:
            assert labelled_images(list_source(path)) == EXPECTED
            assert size > len(whole) * 3 / 4
        except UserError:
            continue
    for value in (0, 2, 2**31, 2**63, 2**64 - 2):
        data = bytearray(whole)
        for start in (16, 4096 + 16):
            at = start + META.size - 24
            data[at : at + 8] = struct.pack("<Q", value)
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=r"a\.lmdb"):
            list_source(path)


def test_an_lmdb_of_named_databases(tmp_path):
    import lmdb

    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False, map_size=2**24, max_dbs=2) as env:
        named = env.open_db(b"images")
        with env.begin(write=True, db=named) as transaction:
            transaction.put(b"0", b"x")
    with pytest.raises(UserError, match="it holds named databases, which are not read"):
        list_source(tmp_path / "a.lmdb")
