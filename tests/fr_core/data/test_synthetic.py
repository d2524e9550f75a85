"""The procedural faces: reproducible, aligned, told apart by identity and not by pixels."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fr_core.data.crops import TEMPLATE
from fr_core.data.landmarks import LANDMARK_COLUMNS
from fr_core.data.synthetic import render_face, write_faces


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_face_is_a_pure_function_of_its_arguments() -> None:
    image, landmarks = render_face(3, 4, seed=5)
    again, same_landmarks = render_face(3, 4, seed=5)
    assert image.dtype == np.uint8
    assert image.shape == (112, 112, 3)
    assert image.flags.c_contiguous
    assert landmarks.dtype == np.float32
    assert landmarks.shape == (5, 2)
    assert np.array_equal(image, again)
    assert np.array_equal(landmarks, same_landmarks)


@pytest.mark.parametrize("other", [(4, 4, 5), (3, 5, 5), (3, 4, 6)], ids=["identity", "shot", "seed"])
def test_identity_shot_and_seed_each_change_the_face(other: tuple[int, int, int]) -> None:
    difference = render_face(3, 4, 5)[0].astype(float) - render_face(*other)[0]
    assert np.abs(difference).mean() > 5


@pytest.mark.parametrize("size", [64, 112])
def test_landmarks_lie_near_the_template_at_any_size(size: int) -> None:
    faces = [render_face(identity, shot, size=size) for identity in range(15) for shot in range(4)]
    points = np.stack([landmarks for _, landmarks in faces])
    distance = np.linalg.norm(points - TEMPLATE * (size / 112), axis=2) * (112 / size)
    assert all(image.shape == (size, size, 3) for image, _ in faces)
    assert points.min() > 0
    assert points.max() < size
    assert distance.mean() < 5
    assert distance.max() < 25


def test_eyes_are_drawn_where_the_landmarks_say() -> None:
    """Eyes are darker than the cheeks right below them, in nearly every picture."""
    darker = 0
    for identity in range(40):
        image, landmarks = render_face(identity, 0)
        for x, y in landmarks[:2].round().astype(int):
            darker += image[y - 2 : y + 3, x - 3 : x + 4].mean() < image[y + 9 : y + 14, x - 3 : x + 4].mean()
    assert darker > 60


def test_written_data_set_has_its_layout_and_does_not_depend_on_workers(tmp_path: Path) -> None:
    finished: list[int] = []
    count = write_faces(tmp_path / "one", 10, 2, seed=1, workers=1, first_identity=7, progress=finished.append)
    assert count == 20
    assert finished[-1] == 20
    assert finished == sorted(finished)
    rows = list(csv.reader((tmp_path / "one/landmarks.csv").open()))
    assert rows[0] == ["path", *LANDMARK_COLUMNS]
    assert len(rows) == 21
    assert [row[0] for row in rows[1:]] == [f"id{i:06d}/{j:03d}.jpg" for i in range(7, 17) for j in range(2)]
    assert np.allclose(np.array(rows[1][1:], float), render_face(7, 0, seed=1)[1].ravel(), atol=0.006)
    write_faces(tmp_path / "two", 10, 2, seed=1, workers=2, first_identity=7)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert len(_files(tmp_path / "one" / "images")) == 20


def test_an_error_in_a_worker_surfaces(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "id000000").write_text("in the way")
    with pytest.raises(FileExistsError):
        write_faces(tmp_path, 1, 1, workers=1)


@pytest.mark.parametrize("bad", [{"identities": 0}, {"shots": 0}, {"size": 0}, {"workers": 0}, {"seed": -1}])
def test_bad_arguments_are_refused_in_one_line(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))) as error:
        write_faces(tmp_path / "none", **{"identities": 1, "shots": 1, **bad})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


def test_render_face_refuses_an_empty_image() -> None:
    with pytest.raises(ValueError, match="size"):
        render_face(0, 0, size=0)


def test_pixels_alone_do_not_verify_unseen_identities() -> None:
    """The nuisances must be strong enough that identity has to be learned."""
    identities, shots = 60, 5
    pixels = np.stack([render_face(i, s)[0][::2, ::2].mean(2).ravel() for i in range(identities) for s in range(shots)])
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    similarity = pixels @ pixels.T
    owner = np.arange(len(pixels)) // shots
    same = owner[:, None] == owner[None]
    np.fill_diagonal(similarity, np.nan)
    genuine, impostor = (values[np.isfinite(values)] for values in (similarity[same], similarity[~same]))
    accuracy = max(((genuine > cut).mean() + (impostor <= cut).mean()) / 2 for cut in np.linspace(-1, 1, 201))
    assert accuracy < 0.75
