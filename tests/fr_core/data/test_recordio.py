import struct

import pytest

from fr_core.data.recordio import image_of, list_records, read_record
from fr_core.errors import UserError
from tests.helpers.packed import MAGIC, frame, payload, write_rec

IMAGES = [b"jpeg" * n + b"x" * (n % 3) for n in range(1, 7)]


@pytest.fixture
def insightface(tmp_path):
    """Record 0 points behind the images; three identities' own records follow, as in the published sets."""
    images = [payload(image, float(i // 2), i + 1) for i, image in enumerate(IMAGES)]
    identities = [payload(b"", 0, 7 + i, (1 + 2 * i, 3 + 2 * i)) for i in range(3)]
    return write_rec(tmp_path / "train.rec", [payload(b"", 0, 0, (7, 10)), *images, *identities])


def read_all(path):
    records = list_records(path)
    data = memoryview(path.read_bytes())
    return records, [image_of(read_record(data, start, 1000)) for start in records.starts_I.tolist()]


@pytest.mark.parametrize("index", [True, False])
def test_the_images_of_a_published_set_with_and_without_its_index(insightface, index):
    if not index:
        insightface.with_suffix(".idx").unlink()
    records, images = read_all(insightface)
    assert images == IMAGES
    assert records.labels_I.tolist() == [0, 0, 1, 1, 2, 2]
    assert records.keys_I.tolist() == [1, 2, 3, 4, 5, 6]


def test_images_that_contain_the_magic_number_are_whole_and_long_labels_count_by_their_first(tmp_path):
    tricky = [b"abcd" + MAGIC + b"efgh" + MAGIC, MAGIC * 2 + b"z", b"a" + MAGIC, b"plain"]
    path = write_rec(tmp_path / "a.rec", [payload(image, 99, i, (5 + i, 0.5)) for i, image in enumerate(tricky)])
    records, images = read_all(path)
    assert images == tricky
    assert records.labels_I.tolist() == [5, 6, 7, 8]


def test_without_a_header_record_all_are_images_even_empty_ones(tmp_path):
    faces = [b"", *IMAGES]
    path = write_rec(tmp_path / "a.rec", [payload(image, float(i // 2), i) for i, image in enumerate(faces)])
    records, images = read_all(path)
    assert images == faces
    assert records.keys_I.tolist() == list(range(7))


def test_broken_files_are_named(insightface, tmp_path):
    insightface.write_bytes(b"not a record" * 100)
    with pytest.raises(UserError, match=r"no record where train\.idx has one"):
        list_records(insightface)
    insightface.with_suffix(".idx").write_text("0\tx\n")
    with pytest.raises(UserError, match=r"train\.idx"):
        list_records(insightface)
    insightface.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match="no record at byte 0"):
        list_records(insightface)
    insightface.write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.rec"):
        list_records(insightface)
    with pytest.raises(UserError, match=r"label 0\.5; labels must be whole numbers"):
        list_records(write_rec(tmp_path / "b.rec", [payload(b"x", 0.5, 0)]))
    with pytest.raises(UserError, match="label nan"):
        list_records(write_rec(tmp_path / "c.rec", [payload(b"x", float("nan"), 0)]))


@pytest.mark.parametrize("index", [True, False])
def test_every_image_of_a_file_that_was_cut_off_is_read_or_lost(insightface, index):
    """Wherever the file ends, record 0 or the index says which images there were."""
    whole = insightface.read_bytes()
    starts = list_records(insightface).starts_I.tolist()
    if not index:
        insightface.with_suffix(".idx").unlink()
    for size in range(starts[4], len(whole)):
        insightface.write_bytes(whole[:size])
        records = list_records(insightface)
        assert sorted([*records.keys_I.tolist(), *records.lost_keys.tolist()]) == [1, 2, 3, 4, 5, 6]
        data = memoryview(whole)[:size]
        for key, start in zip(records.keys_I.tolist(), records.starts_I.tolist(), strict=True):
            if start + 8 + 24 + len(IMAGES[key - 1]) <= size:
                assert image_of(read_record(data, start, 1000)) == IMAGES[key - 1]
            else:
                with pytest.raises(ValueError, match="the file ends inside a record"):
                    read_record(data, start, 1000)


def test_a_cut_file_of_longer_labels_loses_the_image_whose_label_is_cut(tmp_path):
    path = write_rec(tmp_path / "a.rec", [payload(image, 9, i, (i // 2, 0.5)) for i, image in enumerate(IMAGES)])
    path.write_bytes(path.read_bytes()[: list_records(path).starts_I[4] + 8 + 24 + 3])
    for _ in ("with its index", "without"):
        records = list_records(path)
        assert records.keys_I.tolist() == [0, 1, 2, 3]
        assert records.lost_keys.tolist() == ([4, 5] if path.with_suffix(".idx").exists() else [4])
        path.with_suffix(".idx").unlink(missing_ok=True)


def test_a_file_that_lacks_most_of_its_images_is_refused(tmp_path):
    images = [payload(image, float(i // 2), i + 1) for i, image in enumerate(IMAGES)]
    for end, told in ((99.0, "99"), (1e30, "10")):
        path = write_rec(tmp_path / "a.rec", [payload(b"", 0, 0, (end, end + 3)), *images], index=False)
        with pytest.raises(UserError, match=rf"a\.rec: cut off: 7 of {told}\d* records are left; copy the file again"):
            list_records(path)


@pytest.mark.parametrize("kept", [slice(0, 5), slice(2, None), slice(0, None, 2)])
def test_an_index_that_lacks_records_of_its_file_is_refused(insightface, kept):
    index = insightface.with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(True)[kept]))
    with pytest.raises(UserError, match=r"train\.idx: lacks the record at byte \d+: copy it again, or remove it"):
        list_records(insightface)


def test_index_lines_that_occur_twice(insightface):
    index = insightface.with_suffix(".idx")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines, lines[3], lines[9], lines[3]]))
    assert read_all(insightface)[1] == IMAGES
    start = lines[2].split()[1]
    for more, message in (
        (f"3\t{start}\n", r"train\.idx: record 3 begins at two bytes; make the index anew"),
        (f"77\t{start}\n", r"train\.idx: records 2 and 77 begin at one byte; make the index anew"),
        ("77\t-8\n", r"train\.idx: a record begins before the file"),
    ):
        index.write_text("".join([*lines, more]))
        with pytest.raises(UserError, match=message):
            list_records(insightface)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        frame(0, b"x" * 100)[:50],  # truncated
        frame(1, b"x" * 8),  # a first part without a last
        frame(1, b"x" * 8) + frame(0, b"y" * 8),
        frame(3, b"x" * 8),
        frame(0, b"x" * 2000),  # longer than allowed
        MAGIC + struct.pack("<I", 2**29 - 1),
    ],
)
def test_broken_records_are_refused(data):
    with pytest.raises(ValueError, match="record"):
        read_record(memoryview(data), 0, 1000)


def test_a_header_that_promises_more_labels_than_there_are():
    with pytest.raises(ValueError, match="short record"):
        image_of(struct.pack("<IfQQ", 2**31, 0, 0, 0) + b"jpeg")
    with pytest.raises(ValueError, match="short record"):
        image_of(b"short")
