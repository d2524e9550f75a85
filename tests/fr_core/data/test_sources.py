import os
import tarfile
import zipfile

import pytest

from fr_core.data.listing import read_image
from fr_core.data.photos import LONGEST, RejectedImage
from fr_core.data.sources import list_folder, list_source
from fr_core.errors import UserError
from tests.helpers.packed import make_tar, make_zip, payload, write_rec


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
    with pytest.raises(UserError, match=r"x/4\.jpg has no \.cls beside it"):
        list_source(tmp_path)


def test_webdataset_tars_by_texts_and_json(tmp_path):
    files = {"a.b.jpg": b"a", "a.b.json": b'{"caption": "x", "label": 7}', "c.img.jpg": b"c", "c.json": b'{"label": 7}'}
    make_tar(tmp_path / "0.tar", files)
    make_tar(tmp_path / "1.tar", {"d.jpg": b"d", "d.cls.txt": b"8", "d.txt": b"a face", "e.jpg": b"e", "e.txt": b"8"})
    listing = list_source(tmp_path)
    assert content(listing) == {"7": [b"a", b"c"], "8": [b"d", b"e"]}
    assert listing.passed == {".txt files": 1}
    make_tar(tmp_path / "1.tar", {"d.jpg": b"d", "d.json": b'{"caption": "x", "score": 1}'})
    with pytest.raises(UserError, match=r"d\.json names no identity; its fields are caption, score: rename one"):
        list_source(tmp_path)
    make_tar(tmp_path / "1.tar", {f"{who}/{i}.jpg": b"d" for who in "xy" for i in "12"} | {"x/1.json": b"{}"})
    assert set(content(list_source(tmp_path / "1.tar"))) == {"x", "y"}


@pytest.mark.parametrize(
    ("image", "label"),
    [("{}.jpg", "{}.id"), ("s/{}.jpg", "s/{}.identity"), ("{}.input.jpg", "{}.target.cls"), ("{}.png", "{}.Who.txt")],
)
def test_webdataset_tars_by_other_fields(tmp_path, image, label):
    for tar in range(2):
        names = [f"{tar}{shot}" for shot in range(4)]
        files = {image.format(name): name.encode() for name in names}
        files |= {label.format(name): name[1:].replace("2", "0").encode() for name in names}
        make_tar(tmp_path / f"{tar}.tar", files)
    listing = list_source(tmp_path)
    assert content(listing) == {"0": [b"00", b"02", b"10", b"12"], "1": [b"01", b"11"], "3": [b"03", b"13"]}
    assert not listing.passed


def test_fields_that_do_not_tell_the_person(tmp_path):
    files = {f"{i}.{field}": b"%d" % (i // 2) for i in range(4) for field in ("img.jpg", "age.cls", "who.cls")}
    with pytest.raises(UserError, match=r"KEY\.age\.cls or KEY\.who\.cls may name the person; pack one of them as"):
        list_source(make_tar(tmp_path / "a.tar", files))
    files = {f"{i}.{field}": b"%d" % (i // 2) for i in range(4) for field in ("img.jpg", "npy")}
    with pytest.raises(UserError, match=r"no folders; beside them are \.npy files \(4\), which name nobody: pack them"):
        list_source(make_tar(tmp_path / "a.tar", files))
    in_folders = {
        f"{'ab'[i // 2]}/{name}": data for i in range(4) for name, data in ((f"{i}.jpg", b"x"), (f"{i}.age.cls", b"9"))
    }
    assert set(content(list_source(make_tar(tmp_path / "a.tar", in_folders)))) == {"a", "b"}


def test_archives_of_splits_without_people_are_refused(tmp_path):
    for split in ("train", "val"):
        make_zip(tmp_path / f"{split}.zip", {"1.jpg": b"a", "2.jpg": b"b"})
    with pytest.raises(UserError, match="train and the others have neither folders nor labels"):
        list_source(tmp_path)


def test_tars_without_folders_and_labels_may_be_shards_or_people(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"faces-{number:04d}.tar", {"1.jpg": b"a", "2.jpg": b"b"})
    with pytest.raises(UserError, match=r"have neither folders nor labels: unpack each into a folder if it holds one"):
        list_source(tmp_path)
    (tmp_path / "faces-0001.tar").rename(tmp_path / "ben.tar")
    assert len(content(list_source(tmp_path))) == 3


def test_names_in_zips(photos, tmp_path):
    def renamed(name):
        return name.replace("person", "\u5f20")

    files = {renamed(name): data for name, data in files_of(photos, "").items()}
    whole = {renamed(name): images for name, images in content(list_source(photos)).items()}
    with pytest.raises(UserError, match="its names are in no stated encoding; give --names-in gbk"):
        list_source(named_in(tmp_path / "a.zip", files, "gbk"))
    assert content(list_source(named_in(tmp_path / "a.zip", files, "gbk"), names_in="gbk")) == whole
    assert content(list_source(named_in(tmp_path / "a.zip", files, "utf-8"))) == whole


def named_in(path, files, encoding):
    """A zip whose names are bytes of an encoding that it does not state, with backslashes between folders."""
    named = {name.replace("/", "\\").encode(encoding): data for name, data in files.items()}
    make_zip(path, {f"{number:03d}".ljust(len(name), "_"): data for number, (name, data) in enumerate(named.items())})
    raw = path.read_bytes()
    for number, name in enumerate(named):
        raw = raw.replace(f"{number:03d}".ljust(len(name), "_").encode(), name)
    path.write_bytes(raw)
    return path


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
    with pytest.raises(UserError, match=r"a\.zip: names its people itself: leave --labels out"):
        list_source(archive, tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"none\.zip: no such file or folder"):
        list_source(tmp_path / "none.zip", tmp_path / "list.txt")
