import pytest

from fr_core.data.folders import HIDDEN, LOOSE
from fr_core.data.sources import list_folder, list_source
from fr_core.errors import UserError
from tests.helpers.packed import make_zip


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def people(*groups, shots=2):
    return [f"{group}/{shot}.jpg" for group in groups for shot in range(shots)]


def test_hidden_and_system_folders_are_passed_over_and_counted(tmp_path):
    make(tmp_path, *people("anna", "ben", ".git/x", "@eaDir/y", "#snapshot/z", "anna/.ipynb_checkpoints"))
    make(tmp_path, "anna/Thumbs.db", "README", "loose.png", "ben/._1.jpg")
    listing = list_folder(tmp_path)
    assert listing.names == ["anna", "ben"]
    assert len(listing.paths) == 4
    assert listing.passed == {HIDDEN: 9, ".db files": 1, "files without suffix": 1, LOOSE: 1}


def test_a_folder_around_all_people_is_looked_through(tmp_path):
    make(tmp_path, *people("faces/112/anna", "faces/112/ben"), "faces/112/montage.jpg")
    listing = list_folder(tmp_path)
    assert listing.names == ["anna", "ben"]
    assert listing.passed == {LOOSE: 1}
    assert listing.notes == ("people are the folders of faces/112",)


def test_splits_are_joined_by_name(tmp_path):
    make(tmp_path, *people("Train/anna", "Train/ben", "val_set/anna", "val_set/cleo"))
    listing = list_folder(tmp_path)
    assert listing.names == ["anna", "ben", "cleo"]
    assert len(listing.paths) == 8
    assert listing.notes == ("Train (2 people), val_set (2 people) are splits of one set; 1 people are in several",)


def test_folders_below_a_person_are_that_persons(tmp_path):
    make(tmp_path, *people("anna/film 1", "anna/film 2", "ben/film 1", "test/film 9"))
    assert list_folder(tmp_path).names == ["anna", "ben", "test"]


def test_groups_of_people_are_not_taken_for_people(tmp_path):
    make(tmp_path, *people(*(f"{group}/m.{group[0]}{i}" for group in ("african", "asian") for i in range(30))))
    with pytest.raises(UserError, match="african holds 30 folders of photos: give --level 1 if african is"):
        list_folder(tmp_path)
    assert len(list_folder(tmp_path, level=1).names) == 2
    assert len(list_folder(tmp_path, level=2).names) == 30 + 30 - 30


def test_names_that_differ_in_case_alone_are_refused(tmp_path):
    archive = make_zip(tmp_path / "faces.zip", dict.fromkeys(people("Anna", "anna", "ben"), b"x"))
    with pytest.raises(UserError, match="Anna and anna differ in case alone; rename one, or put their images together"):
        list_source(archive)


def test_links_are_followed_and_circles_cut(tmp_path):
    make(tmp_path, *people("store/x", "store/y/deep", "faces/cleo"))
    faces = tmp_path / "faces"
    (faces / "anna").symlink_to(tmp_path / "store" / "x")
    (faces / "ben").mkdir()
    (faces / "ben" / "more").symlink_to(tmp_path / "store" / "y")
    (faces / "cleo" / "up").symlink_to(faces)
    (tmp_path / "store" / "x" / "1.jpg").unlink()
    (tmp_path / "store" / "x" / "1.jpg").symlink_to(tmp_path / "store" / "y" / "deep" / "1.jpg")
    listing = list_folder(faces)
    assert listing.names == ["anna", "ben", "cleo"]
    assert listing.paths == [
        *("anna/0.jpg", "anna/1.jpg", "ben/more/deep/0.jpg", "ben/more/deep/1.jpg", "cleo/0.jpg", "cleo/1.jpg")
    ]
