import shutil
import unicodedata

import pytest

from fr_core.data.folders import HIDDEN, LOOSE
from fr_core.data.listing import read_image
from fr_core.data.photos import RejectedImage
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
    assert listing.notes == (
        "Train (2 people), val_set (2 people) are splits of one set; names in several are one person each: 1 "
        "(else ingest each alone, then bigface merge)",
    )


@pytest.mark.parametrize("split", ["fold{}", "Part_{}", "batch-{}", "shard-0000{}", "train{}", "Fold {}"])
def test_numbered_folders_of_people_are_splits(tmp_path, split):
    make(
        tmp_path,
        *people(*(f"{split.format(number)}/{name}" for number in range(2) for name in (f"anna{number}", "ben"))),
    )
    listing = list_folder(tmp_path)
    assert listing.names == ["anna0", "anna1", "ben"]
    assert len(listing.paths) == 8
    assert (
        f"{split.format(1)} (2 people) are splits of one set; names in several are one person each: 1 "
        in listing.notes[0]
    )
    assert list_folder(tmp_path, level=1).names == [split.format(0), split.format(1)]


def test_numbered_folders_of_photos_are_people(tmp_path):
    make(tmp_path, *people("part1", "part2", "part3/film"))
    assert list_folder(tmp_path).names == ["part1", "part2", "part3"]


def test_splits_in_splits_are_looked_through(tmp_path):
    for fold in range(9):
        make(
            tmp_path, *people(f"cv/fold{fold}/train/anna{fold}", f"cv/fold{fold}/train/ben", f"cv/fold{fold}/test/ben")
        )
    listing = list_folder(tmp_path)
    assert listing.names == [*(f"anna{fold}" for fold in range(9)), "ben"]
    assert listing.notes == (
        "people are the folders of cv",
        "fold0/test (1 person), fold0/train (2 people), fold1/test (1 person), fold1/train (2 people), "
        "fold2/test (1 person), …, fold8/train (2 people) are splits of one set; "
        "names in several are one person each: 1 (else ingest each alone, then bigface merge)",
    )


@pytest.mark.parametrize(
    "splits", [("lfw_train", "lfw_test"), ("images-train", "images-val"), ("train.small", "val"), ("train", "unseen")]
)
def test_splits_with_other_words_in_their_names(tmp_path, splits):
    make(tmp_path, *people(*(f"{split}/{name}" for split in splits for name in ("anna", "ben"))))
    assert list_folder(tmp_path).names == ["anna", "ben"]


def test_a_folder_inside_each_split_is_looked_through(tmp_path):
    make(tmp_path, *people("train/images/anna", "train/images/ben", "val/images/cleo"))
    listing = list_folder(tmp_path)
    assert listing.names == ["anna", "ben", "cleo"]
    assert listing.notes == (
        "train (2 people), val (1 person) are splits of one set",
        "people are the folders of images in each",
    )


def test_a_split_beside_something_else_is_refused(tmp_path):
    make(tmp_path, *people("train/anna", "train/ben", "figures"))
    with pytest.raises(UserError, match="train looks like a part of a set, figures does not: move one away, or give"):
        list_folder(tmp_path)
    assert list_folder(tmp_path, level=1).names == ["figures", "train"]


def test_a_few_folders_of_folders_are_said_to_be_people(tmp_path):
    make(tmp_path, *people("men/anna", "men/ben", "women/cleo", "women/dora"))
    note = "men, which holds 2 folders, is a person; give --level 2 if each of them is"
    assert list_folder(tmp_path).notes == (note,)


def test_folders_below_a_person_are_that_persons(tmp_path):
    make(tmp_path, *people("anna/film 1", "anna/film 2", "ben/film 1", "test/film 9"))
    assert list_folder(tmp_path).names == ["anna", "ben", "test"]


def test_groups_of_people_are_not_taken_for_people(tmp_path):
    make(tmp_path, *people(*(f"{group}/m.{group[0]}{i}" for group in ("african", "asian") for i in range(30))))
    with pytest.raises(UserError, match="african holds 30 folders of photos: give --level 1 if african is"):
        list_folder(tmp_path)
    make(tmp_path / "set" / "around", *people(*(f"{group}/p{i}" for group in ("a", "b") for i in range(20))))
    with pytest.raises(UserError, match="a holds 20 folders of photos: give --level 2 if a is a person, or --level 3"):
        list_folder(tmp_path / "set")
    with pytest.raises(UserError, match="no photo lies 4 folders deep: give a lower --level"):
        list_folder(tmp_path / "set", level=4)
    shutil.rmtree(tmp_path / "set")
    assert len(list_folder(tmp_path, level=1).names) == 2
    assert len(list_folder(tmp_path, level=2).names) == 30 + 30 - 30


def test_names_that_differ_in_case_alone_are_refused(tmp_path):
    archive = make_zip(tmp_path / "faces.zip", dict.fromkeys(people("Anna", "anna", "ben"), b"x"))
    with pytest.raises(UserError, match="Anna and anna differ in case alone; rename one, or put their images together"):
        list_source(archive)


def test_names_that_differ_in_unicode_form_alone_are_refused(tmp_path):
    """macOS writes an accent apart from its letter."""
    apart, whole = (unicodedata.normalize(form, "Zo\u00eb") for form in ("NFD", "NFC"))
    make(tmp_path / "both", *people(apart, whole, "ben"))
    with pytest.raises(UserError, match="differ in Unicode form alone; rename one, or put their images together"):
        list_folder(tmp_path / "both")
    make(tmp_path / "apart", *people(apart, "ben"))
    (tmp_path / "list.csv").write_text(f"{whole}/0.jpg,{whole}\n{whole}/1.jpg,{whole}\nben/0.jpg,ben\nben/1.jpg,ben\n")
    assert list_source(tmp_path / "apart", tmp_path / "list.csv").paths == people(apart, "ben")


def test_links_to_nothing_and_to_themselves_are_counted(tmp_path):
    make(tmp_path, *people("anna", "ben"))
    links = {"self": "self", "ben/self.jpg": "self.jpg", "gone": "nowhere", "anna/gone.jpg": "no.jpg"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    listing = list_folder(tmp_path)
    assert listing.passed == {"files without suffix": 2}
    reasons = []
    for path in ("anna/gone.jpg", "ben/self.jpg"):
        assert path in listing.paths
        with pytest.raises(RejectedImage) as rejected:
            read_image("files", str(tmp_path), path, 0, 0)
        reasons.append(str(rejected.value))
    assert reasons == ["No such file or directory", "Too many levels of symbolic links"]


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
