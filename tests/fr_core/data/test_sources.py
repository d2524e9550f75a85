import numpy as np
import pytest

from fr_core.data.sources import LANDMARK_COLUMNS, list_folder, match_landmarks, read_landmarks
from fr_core.errors import UserError

HEADER = ",".join(("path", *LANDMARK_COLUMNS))


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


def test_landmarks_match_with_and_without_the_folder_name(photos, tmp_path):
    table = tmp_path / "points.csv"
    numbers = ",".join(str(n) for n in range(10))
    table.write_text(f"{HEADER}\nperson0/0.jpg,{numbers}\npeople/person0/1.jpg,{numbers}\n")
    points = match_landmarks(list_folder(photos), read_landmarks(table))
    assert np.array_equal(points[0], np.arange(10).reshape(5, 2))
    assert np.array_equal(points[1], points[0])
    assert points[2] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,x\n", "no column left_eye_x"),
        (f"{HEADER}\na.jpg,1,2\n", "line 2: not ten numbers"),
        (f"{HEADER}\na.jpg,1,2,3,4,5,6,7,8,9,x\n", "line 2: not ten numbers"),
    ],
)
def test_bad_landmark_tables_name_the_line(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_landmarks(path)


def test_a_table_of_other_images_is_refused(photos):
    with pytest.raises(UserError, match=r"names none of the images, such as person0/0\.jpg"):
        match_landmarks(list_folder(photos), {"x.jpg": np.zeros((5, 2))})
