import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.errors import UserError
from fr_core.verify.pair_lists import read_pairs

ROWS = [("a b/a b_0001.jpg", "a b/a b_0002.jpg", True), ("a b/a b_0001.jpg", "c/c_0012.jpg", False)] * 12
BOM = "\ufeff"


def test_our_csv_with_and_without_folds(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("image_a,image_b,same,fold\na.jpg,b.jpg,1,3\nb.jpg,c.jpg,0,4\n")
    pairs = read_pairs(path)
    assert pairs.paths == ["a.jpg", "b.jpg", "c.jpg"]
    assert (pairs.left.tolist(), pairs.right.tolist()) == ([0, 1], [1, 2])
    assert (pairs.same.tolist(), pairs.fold.tolist()) == ([True, False], [3, 4])
    path.write_text("image_a,image_b,same\n" + "a.jpg,b.jpg,1\na.jpg,c.jpg,0\n" * 12)
    pairs = read_pairs(path)
    assert np.bincount(pairs.fold[pairs.same]).tolist() == [2, 2] + [1] * 8
    assert np.array_equal(pairs.fold[pairs.same], pairs.fold[~pairs.same])


def test_lfw_pairs(tmp_path):
    path = tmp_path / "pairs.txt"
    lines = ["2\t2", "Ann\t1\t4", "Bob\t2\t3", "Ann\t1\tBob\t12", "Eve_X\t3\tAnn\t1"]
    lines += ["Cy\t1\t2", "Cy\t1\t3", "Cy\t1\tDee\t1", "Dee\t2\tCy\t1"]
    path.write_text("\n".join(lines) + "\n")
    pairs = read_pairs(path)
    names = [(pairs.paths[a], pairs.paths[b]) for a, b in zip(pairs.left, pairs.right, strict=True)]
    assert names[0] == ("Ann/Ann_0001.jpg", "Ann/Ann_0004.jpg")
    assert names[2] == ("Ann/Ann_0001.jpg", "Bob/Bob_0012.jpg")
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no pairs"),
        ("what,ever\n1,2\n", "neither a CSV"),
        ("image_a,image_b,same\na,b,2\n", "line 2"),
        ("p/1.jpg p/2.jpg 0\np/1.jpg q/1.jpg 1\n", "flagged as two people, all others as one: 1 must mean the same"),
        ("one,two,same\na.jpg,b.jpg,1\n", "no column image_a"),
        ("a.jpg b.jpg 1 3\n", "neither a CSV"),
        ("image_a,image_b,same\na,b,1\na\n", "line 3"),
        ("image_a,image_b,same\n", "no pairs"),
        ("10\t300\nAnn\tx\t2\n", "line 2"),
        ("10\t300\nAnn\t1\n", "line 2"),
        ("2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nBob\t1\t2\n", "3 pairs, but its first line says 2 folds of 2"),
    ],
)
def test_bad_pairs_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "pairs"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(path)


def test_a_folder_or_an_absent_list_names_the_mend(tmp_path):
    with pytest.raises(UserError, match="no such list of pairs: correct the path"):
        read_pairs(tmp_path / "absent.csv")
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(UserError, match=r"is a folder, not a list of pairs: give .*pairs\.csv"):
        read_pairs(tmp_path)


@pytest.mark.fuzz
@given(st.text(alphabet="image_ab,same0123 \t\n\r\"'é", max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "pairs"
    path.write_text(text)
    with contextlib.suppress(UserError):
        assert len(read_pairs(path).same) > 0


LISTS = [
    "2\t6\n" + "a b\t1\t2\na b\t1\tc\t12\n" * 12,
    "".join(f"{a} {b} {int(same)}\n" for a, b, same in ROWS),
    "image_a,image_b,same,fold\n" + "".join(f"{a},{b},{same},{i % 3}\n" for i, (a, b, same) in enumerate(ROWS)),
]
WORDS = ["nan", "-1", "1e400", "9" * 5000, "\t", ",", '"', "\n", BOM, "\0", "²", ""]


@pytest.mark.fuzz
@given(text=st.sampled_from(LISTS), places=st.lists(st.tuples(st.integers(0, 900), st.sampled_from(WORDS)), max_size=5))
def test_any_change_of_a_list_is_read_or_refused(tmp_path_factory, text, places):
    for place, word in places:
        text = text[:place] + word + text[place + 1 :]
    path = tmp_path_factory.mktemp("fuzz") / "pairs"
    path.write_text(text)
    with contextlib.suppress(UserError):
        assert len(read_pairs(path).same) > 0


def write(path, line, before=""):
    path.write_text(before + "".join(line(*row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ("", lambda a, b, same: f"{a} {b} {int(same)}"),
        ("", lambda a, b, same: f"{a} {b} {1 if same else -1}"),
        ("", lambda a, b, same: f"{a},{b},{same}"),
        (f"{BOM}image_a, image_b, same\n", lambda a, b, same: f"{a}, {b}, {int(same)}"),
        ("pair_id,fold_id,img1,img2,is_same\n", lambda a, b, same: f"9,,{a},{b},{'yes' if same else 'no'}"),
        ("", lambda a, b, same: f"{int(same)} {a} {b}"),
        ("", lambda a, b, same: f"{'positive' if same else 'negative'},{a},{b}"),
        ("24\n", lambda a, b, same: f"{a} {b} {int(same)}"),
        ("# two paths, and 1 for the same person\n", lambda a, b, same: f"{a} {b} {int(same)}"),
        ("Left,Right,Same\n", lambda a, b, same: f"{a},{b},{same}"),
        ("Image 1, Image 2, Label\n", lambda a, b, same: f"{a}, {b}, {int(same)}"),
        ("", lambda a, b, same: f'{{"image1": "{a}", "image2": "{b}", "label": {int(same)}}}'),
        ("label;path_b;path_a\n", lambda a, b, same: f"{float(same)};{b};{a}"),
    ],
)
def test_paths_and_a_flag_in_any_form(tmp_path, before, line):
    pairs = read_pairs(write(tmp_path / "pairs.txt", line, before))
    found = [(pairs.paths[a], pairs.paths[b]) for a, b in zip(pairs.left, pairs.right, strict=True)]
    assert list(zip(*zip(*found, strict=True), pairs.same.tolist(), strict=True)) == ROWS
    assert set(pairs.fold.tolist()) == set(range(10))


@pytest.mark.parametrize("blank", ["\t", " "])
@pytest.mark.parametrize("before", ["", f"{BOM}1{{0}}12\n", "12\n"])
def test_names_with_blanks_in_lfws_form(tmp_path, before, blank):
    rows = ["a b{0}1{0}2", "a b{0}1{0}c{0}12"] * 12
    (tmp_path / "pairs.txt").write_text((before + "\n".join(rows) + "\n").format(blank))
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert [(pairs.paths[a], pairs.paths[b], bool(s)) for a, b, s in zip(pairs.left, pairs.right, pairs.same)] == ROWS  # noqa: B905


def test_lfws_lists_as_csv_with_a_header_and_an_empty_cell(tmp_path):
    rows = ["a b,1,2,", "a b,1,c,12"] * 12
    (tmp_path / "pairs.csv").write_text("\n".join(["name,imagenum1,imagenum2,", *rows]) + "\n")
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert [(pairs.paths[a], pairs.paths[b], bool(s)) for a, b, s in zip(pairs.left, pairs.right, pairs.same)] == ROWS  # noqa: B905


def test_paths_without_suffix(tmp_path):
    (tmp_path / "pairs.txt").write_text("a/1 a/2 1\na/1 b/2 0\n" * 5)
    assert read_pairs(tmp_path / "pairs.txt").paths == ["a/1", "a/2", "b/2"]


def test_a_list_in_which_some_pairs_have_a_fold_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("image_a,image_b,same,fold\na,b,1,1\na,c,0,\n")
    with pytest.raises(UserError, match="line 3: it has no fold, but others do"):
        read_pairs(tmp_path / "pairs.csv")
