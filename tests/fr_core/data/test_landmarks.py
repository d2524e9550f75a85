import numpy as np
import pytest

from fr_core.data.crops import TEMPLATE, encode, make_crop, misfits
from fr_core.data.landmarks import DENSE_COLUMNS, LANDMARK_COLUMNS, MIRRORED, match_landmarks, read_landmarks
from fr_core.data.photos import RejectedImage
from fr_core.data.sources import list_folder
from fr_core.errors import UserError
from tests.helpers.machine import REAL_DATA, needs_real_data

HEADER = ",".join(("path", *LANDMARK_COLUMNS))
DENSE_HEADER = ",".join(("path", *DENSE_COLUMNS))


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


def test_two_faces_of_one_image_are_refused_but_not_a_line_that_repeats(tmp_path):
    row = "a.jpg " + " ".join(map(str, range(10))) + "\n"
    (tmp_path / "table.txt").write_text(row * 2)
    assert list(read_landmarks(tmp_path / "table.txt")) == ["a.jpg"]
    (tmp_path / "table.txt").write_text(row + row.replace(" 9", " 8"))
    with pytest.raises(UserError, match=r"line 2: a\.jpg has other points in an earlier line; keep one face"):
        read_landmarks(tmp_path / "table.txt")


def test_a_table_of_other_images_is_refused(photos):
    with pytest.raises(UserError, match=r"names none of the images, such as person0/0\.jpg"):
        match_landmarks(list_folder(photos).paths, {"x.jpg": np.zeros((5, 2))})


@pytest.fixture
def faces():
    """Five points of faces as detectors find them: the template turned, moved, scaled, each point a few pixels off."""
    random = np.random.default_rng(0)
    angles, scales = random.uniform(-0.5, 0.5, 40), random.uniform(0.4, 3, 40)
    turns = scales[:, None, None] * np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]).T
    noise = random.normal(0, 2, (40, 5, 2)) * scales[:, None, None]
    return {f"{i}.jpg": points for i, points in enumerate(TEMPLATE @ turns + 60 + noise)}


def lines(points, order, blank=" "):
    return "".join(f"{name}{blank}{blank.join(f'{v:.2f}' for v in order(five))}\n" for name, five in points.items())


@pytest.mark.parametrize(
    ("before", "order"),
    [
        ("", lambda five: five.ravel()),
        ("", lambda five: five.T.ravel()),
        ("40\nlefteye_x lefteye_y righteye_x righteye_y nose_x nose_y …\n", lambda five: five.ravel()),
        ("image_id lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x "
         "rightmouth_y\n", lambda five: five.ravel()),
    ],
)  # fmt: skip
def test_tables_as_the_field_writes_them(faces, tmp_path, before, order):
    (tmp_path / "points.txt").write_text(before + lines(faces, order))
    found = read_landmarks(tmp_path / "points.txt")
    assert found.keys() == faces.keys()
    assert all(np.allclose(found[name], faces[name], atol=0.01) for name in faces)


def test_left_and_right_of_the_subject_are_exchanged_with_a_word(faces):
    points, notes = match_landmarks(list(faces), faces)
    assert np.array_equal(points, np.stack(list(faces.values())))
    assert not notes
    mirrored, notes = match_landmarks(list(faces), {name: five[MIRRORED] for name, five in faces.items()})
    assert np.array_equal(mirrored, points)
    assert "left and right of the landmarks are the subject's: exchanged" in notes[0]


@pytest.mark.parametrize("order", [[2, 0, 1, 3, 4], [3, 4, 2, 0, 1], [4, 3, 2, 1, 0], [0, 1, 2, 4, 3]])
def test_points_in_another_order_are_refused(faces, order):
    with pytest.raises(UserError, match="the landmarks fit no upright face: give left_eye, right_eye, nose"):
        match_landmarks(list(faces), {name: five[order] for name, five in faces.items()})


def test_points_that_are_no_pixels_are_refused(faces):
    with pytest.raises(UserError, match="shares of the images' sides: multiply them by width and height"):
        match_landmarks(list(faces), {name: five / 250 for name, five in faces.items()})
    with pytest.raises(UserError, match="fit no upright face"):  # y before x
        match_landmarks(list(faces), {name: five[:, ::-1] for name, five in faces.items()})


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (TEMPLATE + 900, "landmarks outside the image"),
        (TEMPLATE * 0.02 + 50, "landmarks of a face of a few pixels"),
        (TEMPLATE[[1, 0, 2, 4, 3]], "landmarks not of a face"),
    ],
)
def test_landmarks_that_no_face_in_the_image_has_are_rejected(points, reason):
    with pytest.raises(RejectedImage, match=reason):
        make_crop(encode(np.zeros((200, 200, 3), np.uint8)), 112, points)


@needs_real_data
def test_hardly_a_real_face_is_rejected_and_hardly_a_mirrored_one_is_not():
    points = np.stack(list(read_landmarks(REAL_DATA / "faces" / "landmarks.csv").values()))
    assert (misfits(points) > 15).mean() < 0.001
    assert (misfits(points[:, MIRRORED]) > 15).mean() > 0.999
