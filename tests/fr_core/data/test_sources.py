import os
import tarfile

import pytest

from fr_core.data.listing import read_image
from fr_core.data.photos import LONGEST, RejectedImage
from fr_core.data.sources import list_folder, list_source
from fr_core.errors import UserError
from tests.helpers.packed import content, files_of, make_zip, payload, write_rec


def test_identities_and_images_are_listed_by_name(photos):
    listing = list_folder(photos)
    assert listing.names == [f"person{i}" for i in range(6)]
    assert listing.paths[:2] == ["person0/0.jpg", "person0/1.jpg"]
    assert listing.labels.tolist() == [i for i in range(6) for _ in range(5)]


def test_folders_without_a_dataset_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="no identity folders"):
        list_folder(tmp_path)
    (tmp_path / "loose.jpg").touch()
    with pytest.raises(UserError, match="give each person a folder"):
        list_folder(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    with pytest.raises(UserError, match="one image per identity"):
        list_folder(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(photos, monkeypatch):
    scan, closed = os.scandir, str(photos / "person3")

    def scandir(path="."):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="person3: Permission denied; make the folder readable"):
        list_folder(photos)


def test_lists_of_files(photos, tmp_path):
    expected = content(list_source(photos))
    rows = [(f"{name}/{i}.jpg", name) for name in expected for i in range(5)]
    for name, text in (
        ("list.txt", "".join(f"{path} {who}\n" for path, who in rows)),
        ("list.tsv", "".join(f"{path}\t{who}\n" for path, who in rows)),
        ("list.csv", "path,score,identity\n" + "".join(f"{path},1,{who}\n" for path, who in rows)),
    ):
        (tmp_path / name).write_text(text)
        assert content(list_source(photos, tmp_path / name)) == expected
        (photos / name).write_text(text)
        assert content(list_source(photos / name)) == expected
        (photos / name).unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\n", "line 1: expected a path and an identity"),
        ("a.jpg x\n../../etc/passwd x\n", r"\.\./\.\./etc/passwd leads out of"),
        ("a.jpg x\n/etc/passwd x\n", "/etc/passwd leads out of"),
        ("a.jpg x\na.jpg y\n", "a.jpg is listed twice"),
        ("", "no images"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        list_source(tmp_path / "list.txt")


def test_sources_that_cannot_be_read(tmp_path):
    for name, data, message in (
        ("a.zip", b"no zip", "not a readable zip archive"),
        ("a.tar", b"no tar" * 200, "not a readable tar archive"),
        ("a.tar.gz", b"\x1f\x8b", "decompress it first"),
        ("a.bin", b"", "a set of pairs for verification"),
        ("a.mat", b"", "unknown kind of source"),
        ("b.csv", b"path,y\na.jpg,1\n", "no column identity; rename one of its columns path, y"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            list_source(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        list_source(tmp_path / "absent.rec")


def test_a_folder_around_tables_or_archives_is_looked_through(photos, tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").touch()
    (tmp_path / "hub" / ".cache").mkdir()
    make_zip(tmp_path / "hub" / "data" / "a.zip", files_of(photos, ""))
    assert content(list_source(tmp_path / "hub")) == content(list_source(photos))


def test_what_a_folder_without_images_holds_is_said(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.tfr").touch()
    with pytest.raises(UserError, match=r"it holds \.tfr files \(12\): expected IDENTITY"):
        list_source(tmp_path)


def test_kinds_beside_each_other_are_refused(photos, tmp_path):
    files = files_of(photos, "")
    make_zip(tmp_path / "a.zip", files)
    (tmp_path / "person9").mkdir()
    with pytest.raises(UserError, match=r"several kinds of sources, a\.zip, person9;"):
        list_source(tmp_path)
    (tmp_path / "person9").rmdir()
    (tmp_path / "b.tar.gz").touch()
    with pytest.raises(UserError, match="several kinds of sources"):
        list_source(tmp_path)
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(UserError, match=r"a\.zip, b\.tar; give the path of one"):
        list_source(tmp_path)
    (tmp_path / "b.tar").rename(tmp_path / "b.tar.gz")
    (tmp_path / "a.zip").unlink()
    with pytest.raises(UserError, match="decompress it first"):
        list_source(tmp_path)


def test_names_that_are_no_text(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("M\xfcller/1.jpg", "M\xfcller/2.jpg", "b/1.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="is not UTF-8"):
        list_source(tmp_path / "a.tar")


def test_loose_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(LONGEST + 1)
    for path, reason in (("pipe.jpg", "no regular file"), ("large.jpg", "too large"), ("a\0.jpg", "no path")):
        with pytest.raises(RejectedImage, match=reason):
            read_image("files", str(tmp_path), path, 0, 0)


RECORD_LISTS = {
    "DCFace's": lambda i: f"{i}\tp{i // 2}/{i}.jpg",
    "MXNet's": lambda i: f"{i}\t{i // 2}.000\t/data/{i}.jpg",
    "numbers and names with blanks": lambda i: f"{i} {'ABCD'[i // 2]} van Dam",
    "a table": lambda i: f"{i},p{i // 2}",
}


@pytest.mark.parametrize("form", RECORD_LISTS)
@pytest.mark.parametrize("index", [True, False])
def test_the_people_of_records_from_a_list(tmp_path, form, index):
    path = write_rec(tmp_path / "file.rec", [payload(b"face%d" % i, 0.0, i) for i in range(6)], index)
    table = tmp_path / "list.txt"
    table.write_text("".join(RECORD_LISTS[form](i) + "\n" for i in range(7)))
    for source in (path, tmp_path):
        listing = list_source(source, table)
        assert listing.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert listing.paths == [str(i) for i in range(6)]
        assert listing.lost == (("6", "listed, but not in the file"),)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 a", "2 a", "3 b"], "record 0 of file.rec is not in it"),
        (["0 a", "1 a", "1 b", "2 b"], "line 3: record 1 has two identities"),
        (["a/0.jpg 0", "a/1.jpg 0", "b/2.jpg 1"], "line 1: expected the number of a record"),
        (["0,0,1", "1,0,1", "2,1,1", "3,1,2"], "the identity may be column 2 or 3; keep one of them"),
        (["0,a/0.jpg,b/0.jpg", "1,a/1.jpg,b/1.jpg"], "several columns name images"),
        (["0 0.jpg", "1 1.jpg", "2 2.jpg"], "line 1: expected a path and an identity"),
        ([""], "names no records"),
    ],
)
def test_lists_that_do_not_name_the_records_are_refused(tmp_path, lines, message):
    path = write_rec(tmp_path / "file.rec", [payload(b"face%d" % i, 0.0, i) for i in range(3)])
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        list_source(path, tmp_path / "list.txt")


def test_records_without_labels_ask_for_a_list_and_other_sources_refuse_one(tmp_path):
    path = write_rec(tmp_path / "file.rec", [payload(b"face%d" % i, 0.0, i) for i in range(3)])
    with pytest.raises(UserError, match="all 3 records have the label 0: give --labels LIST"):
        list_source(path)
    (tmp_path / "list.txt").write_text("0 a\n1 a\n2 b\n")
    archive = make_zip(tmp_path / "a.zip", {"a/1.jpg": b"a", "a/2.jpg": b"b", "b/1.jpg": b"c"})
    with pytest.raises(UserError, match=r"a\.zip: leave --labels out if its folders are people"):
        list_source(archive, tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"none\.zip: no such file or folder"):
        list_source(tmp_path / "none.zip", tmp_path / "list.txt")
