"""Zip and tar archives hold what the folder holds; nothing in them leads outside or is lost unseen."""

import io
import tarfile
import warnings
import zipfile

import pytest

from fr_core.data.listing import read_image
from fr_core.data.photos import LONGEST, RejectedImage
from fr_core.data.sources import list_source
from fr_core.errors import UserError
from tests.helpers.packed import content, files_of, make_tar, make_zip, payload, write_rec


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


def test_archives_of_splits_without_people_are_refused(tmp_path):
    for split in ("train", "val"):
        make_zip(tmp_path / f"{split}.zip", {"1.jpg": b"a", "2.jpg": b"b"})
    with pytest.raises(UserError, match="train and the others have neither folders nor labels"):
        list_source(tmp_path)


@pytest.mark.parametrize("suffix", ["ZIP", "Tar"])
def test_a_later_file_of_the_same_name_replaces_the_earlier(tmp_path, suffix):
    """As unpacking does; the suffix may be in capitals."""
    path = tmp_path / f"a.{suffix}"
    faces = [("a/1.jpg", b"old"), ("a/2.jpg", b"2"), ("b/1.jpg", b"3"), ("a/1.jpg", b"new")]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        for name, data in faces:
            archive.writestr(name, data)
    if suffix == "Tar":
        with tarfile.open(path, "w") as archive:
            for name, data in faces:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    listing = list_source(path)
    assert content(listing) == {"a": [b"new", b"2"], "b": [b"3"]}
    assert listing.passed == {"files that a later one of the same name replaces": 1}


def test_archives_of_archives_are_refused_and_photos_beside_them_counted(photos, tmp_path):
    inner = make_zip(tmp_path / "anna.zip", files_of(photos, "")).read_bytes()
    with pytest.raises(UserError, match=r"no images of people, but \.zip files \(1\): expected PERSON/photo\.jpg;"):
        list_source(make_zip(tmp_path / "outer.zip", {"anna.zip": inner}))
    with pytest.raises(UserError, match=r"holds no images of people: expected PERSON"):
        list_source(make_zip(tmp_path / "outer.zip", {}))
    (tmp_path / "outer.zip").unlink()
    for name in ("me.jpg", "README", "lfw.bin", "cfp.bin"):
        (tmp_path / name).touch()
    listing = list_source(tmp_path)
    assert content(listing) == content(list_source(photos))
    passed = {"photos beside a file that packs others": 1, "files without suffix": 1, ".bin files": 2}
    assert listing.passed == passed
    (tmp_path / "anna.zip").unlink()
    write_rec(tmp_path / "train.rec", [payload(b"face", float(i // 2), i) for i in range(4)])
    assert list_source(tmp_path).passed == passed
    with pytest.raises(UserError, match=r"holds no images of people, .*: expected folders 3 deep, or a lower --level"):
        list_source(make_zip(tmp_path / "outer.zip", files_of(photos, "")), level=3)


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


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.jpg": b"x" * 500, "b/1.jpg": b"y", "b/2.jpg": b"z"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RejectedImage, match="damaged archive"):
        content(list_source(path))
