import os
import tarfile
import zipfile

import numpy as np
import pytest

from fr_core.data.crops import TEMPLATE
from fr_core.data.landmarks import DENSE_COLUMNS, LANDMARK_COLUMNS, match_landmarks, read_landmarks
from fr_core.data.listing import read_image
from fr_core.data.photos import LONGEST, RejectedImage
from fr_core.data.sources import list_folder, list_source
from fr_core.errors import UserError
from tests.helpers.packed import make_tar, make_zip

HEADER = ",".join(("path", *LANDMARK_COLUMNS))
DENSE_HEADER = ",".join(("path", *DENSE_COLUMNS))


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


def test_landmarks_match_with_and_without_the_folder_name(photos, tmp_path):
    table = tmp_path / "points.csv"
    numbers = ",".join(str(n) for n in TEMPLATE.ravel())
    table.write_text(f"{HEADER}\nperson0/0.jpg,{numbers}\npeople/person0/1.jpg,{numbers}\n")
    points, _ = match_landmarks(list_folder(photos).paths, read_landmarks(table))
    assert np.allclose(points[0], TEMPLATE)
    assert np.array_equal(points[1], points[0])
    assert np.isnan(points[2]).all()


def test_68_points_become_the_five_of_the_template(tmp_path):
    """A face drawn in iBUG's order; OpenFace writes all x first, a blank after each comma, and columns of its own."""
    points = np.full((68, 2), -1.0)
    points[36:42] = [(36, 52), (38, 50), (40, 50), (42, 52), (40, 54), (38, 54)]  # left in the image: the right eye
    points[42:48] = points[36:42] + np.array([34, 1])
    points[30], points[48], points[54] = (56, 72), (42, 92), (71, 93)
    table = tmp_path / "points.csv"
    header = ["path", "confidence", *(f"x_{i}" for i in range(68)), *(f"y_{i}" for i in range(68))]
    table.write_text(", ".join(header) + "\n" + ", ".join(["a.jpg", "0.98", *map(str, points.T.ravel())]) + "\n")
    assert read_landmarks(table)["a.jpg"].tolist() == [[39, 52], [73, 53], [56, 72], [42, 92], [71, 93]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,x\n", "no column left_eye_x"),
        (f"{HEADER}\na.jpg,1,2\n", "line 2: not 10 numbers"),
        (f"{HEADER}\na.jpg,1,2,3,4,5,6,7,8,9,x\n", "line 2: not 10 numbers"),
        ("path, x_0, y_0\n", "no column x_1"),
        (f"{DENSE_HEADER}\na.jpg,1,2\n", "line 2: not 136 numbers"),
    ],
)
def test_bad_landmark_tables_name_the_line(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_landmarks(path)


def test_a_table_of_other_images_is_refused(photos):
    with pytest.raises(UserError, match=r"names none of the images, such as person0/0\.jpg"):
        match_landmarks(list_folder(photos).paths, {"x.jpg": np.zeros((5, 2))})


def content(listing):
    """identity -> its images' bytes, in order."""
    found = {}
    for row in listing.images.to_pylist():
        data = read_image(listing.kind, listing.files[row["file"]], row["path"], row["start"], row["length"])
        found.setdefault(listing.names[row["label"]], []).append(data)
    return found


def files_of(photos, prefix):
    return {f"{prefix}{p.relative_to(photos)}": p.read_bytes() for p in sorted(photos.rglob("*.jpg"))}


def test_archives_hold_what_the_folder_holds(photos, tmp_path):
    whole = content(list_source(photos))
    files = files_of(photos, "data/faces/") | {"data/readme.txt": b"no image", "data/faces/person0/": b""}
    archives = [
        make_zip(tmp_path / "deflated.zip", files),
        make_zip(tmp_path / "stored.zip", files, zipfile.ZIP_STORED),
        make_tar(tmp_path / "faces.tar", {k: v for k, v in files.items() if not k.endswith("/")}),
    ]
    for archive in archives:
        assert content(list_source(archive)) == whole


def test_a_folder_of_archives_each_with_its_own_root(photos, tmp_path):
    files = files_of(photos, "")
    for number in range(3):
        own = {f"0_{number}/{k}": v for k, v in files.items() if int(k[6]) % 3 == number}
        make_zip(tmp_path / f"0_{number}.zip", own)
    listing = list_source(tmp_path)
    assert content(listing) == content(list_source(photos))
    assert listing.paths[0] == "0_0.zip/0_0/person0/0.jpg"


def test_an_archive_of_one_person_and_one_without_folders(tmp_path):
    make_tar(tmp_path / "anna.tar", {"1.jpg": b"a", "2.jpg": b"b"})
    make_tar(tmp_path / "x.tar", {"photos/ben/1.jpg": b"c", "photos/ben/2.jpg": b"d"})
    assert content(list_source(tmp_path)) == {"anna": [b"a", b"b"], "ben": [b"c", b"d"]}


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


def test_members_that_cannot_be_read_say_why(tmp_path):
    bomb = make_zip(tmp_path / "bomb.zip", {"a/1.jpg": bytes(LONGEST + 1), "b/1.jpg": b"x", "b/2.jpg": b"y"})
    listing = list_source(bomb)
    first = listing.images.to_pylist()[0]
    with pytest.raises(RejectedImage, match="too large"):
        read_image("zip", str(bomb), first["path"], first["start"], first["length"])
    files = {"a/1.jpg": b"x" * 900, "b/1.jpg": b"x", "b/2.jpg": b"y" * 900}
    damaged = make_zip(tmp_path / "damaged.zip", files, zipfile.ZIP_STORED)
    data = bytearray(damaged.read_bytes())
    data[0] ^= 1
    damaged.write_bytes(bytes(data))
    with pytest.raises(RejectedImage, match="damaged archive"):
        content(list_source(damaged))
    tar = make_tar(tmp_path / "cut.tar", files)
    places = list_source(tar).images.to_pylist()
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(RejectedImage, match="truncated archive"):
        read_image("plain", str(tar), "", places[2]["start"], 2000)
    with pytest.raises(RejectedImage, match="No such file"):
        read_image("files", str(tmp_path), "absent.jpg", 0, 0)


def test_webdataset_tars_by_their_classes(tmp_path):
    make_tar(tmp_path / "0.tar", {"1.jpg": b"a", "1.cls": b"7", "2.png": b"b", "2.cls": b"8\n", "2.json": b"{}"})
    make_tar(tmp_path / "1.tar", {"./x/3.jpg": b"c", "./x/3.cls": b"7"})
    assert content(list_source(tmp_path)) == {"7": [b"a", b"c"], "8": [b"b"]}
    make_tar(tmp_path / "1.tar", {"x/3.jpg": b"c", "x/3.cls": b"7", "x/4.jpg": b"d"})
    with pytest.raises(UserError, match=r"x/4\.jpg has no \.cls or \.json beside it"):
        list_source(tmp_path)


def test_damaged_tars_are_refused_whole(tmp_path):
    files = {f"{who}/{i}.jpg": bytes(700) for who in "abcd" for i in range(3)}
    whole = make_tar(tmp_path / "a.tar", files).read_bytes()
    header = whole.index(b"c/0.jpg")
    (tmp_path / "a.tar").write_bytes(whole[: header + 150] + b"x" + whole[header + 151 :])  # its checksum
    (tmp_path / "b.tar").write_bytes(whole + whole)
    for name in ("a.tar", "b.tar"):
        with pytest.raises(UserError, match="damaged after byte"):
            list_source(tmp_path / name)


def test_tars_that_walk_in_circles_or_nest_without_end(tmp_path):
    def header(name, size, kind):
        info = tarfile.TarInfo(name)
        info.type = kind
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        block[124:136] = size
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    first = header("a/1.jpg", b"00000000000\0", tarfile.REGTYPE)
    circle = first + header("a/2.jpg", b"\xff" * 10 + (-512).to_bytes(2, "big", signed=True), tarfile.REGTYPE)
    nested = header("x", b"00000000001\0", tarfile.GNUTYPE_LONGNAME) + b"y".ljust(512, b"\0")
    huge = header("x", b"\x80" + (2**60).to_bytes(11, "big"), tarfile.GNUTYPE_LONGNAME)
    for data in (circle * 3, nested * 3000, first + huge):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.tar"):
            list_source(tmp_path / "a.tar")


def test_what_macos_leaves_beside_images_is_none(photos, tmp_path):
    files = files_of(photos, "faces/")
    files |= {f"__MACOSX/{name.replace('/0', '/._0')}": b"x" for name in files} | {"faces/person1/._2.jpg": b"x"}
    assert content(list_source(make_zip(tmp_path / "a.zip", files))) == content(list_source(photos))


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


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.jpg": b"x" * 500, "b/1.jpg": b"y", "b/2.jpg": b"z"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RejectedImage, match="damaged archive"):
        content(list_source(path))
