"""WebDataset tars: files beside the images name the people."""

import pytest

from fr_core.data.sources import list_source
from fr_core.errors import UserError
from tests.helpers.packed import content, make_tar


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


def test_folders_of_parts_whose_json_names_the_people_are_refused(tmp_path):
    files = {f"{shot:03d}/{who}.jpg": b"a" for who in range(3) for shot in range(2)}
    files |= {name.replace("jpg", "json"): b'{"label": %d}' % int(name[4]) for name in files}
    tar = make_tar(tmp_path / "0.tar", files)
    with pytest.raises(
        UserError, match=r"000/0\.jpg lies in a folder of several people, says the JSON beside it: name"
    ):
        list_source(tar)
    assert set(content(list_source(tar, level=1))) == {"000", "001"}


def test_json_with_numbers_of_any_kind_and_capitals(tmp_path):
    files = {f"{i}.jpg": b"%d" % i for i in range(4)} | {f"{i}.json": b'{"Label": %.1f}' % (i // 2) for i in range(4)}
    assert content(list_source(make_tar(tmp_path / "0.tar", files))) == {"0": [b"0", b"1"], "1": [b"2", b"3"]}


def test_captions_are_no_people(tmp_path):
    files = {f"{i}.jpg": b"a" for i in range(4)} | {
        f"{i}.txt": b"a photo of a smiling face number %d" % i for i in range(4)
    }
    with pytest.raises(UserError, match=r"0\.txt holds a caption, not a person: name the person in KEY\.cls"):
        list_source(make_tar(tmp_path / "0.tar", files))


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
