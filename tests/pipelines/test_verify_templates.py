from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from fr_core.data.crops import TEMPLATE as POINTS
from fr_core.data.crops import encode
from fr_core.data.decode import decode
from fr_core.errors import UserError
from pipelines.nets.verify_templates import template_figures, verify_templates


class Pixels:
    """A recogniser by small pictures, whose features' lengths differ."""

    net = SimpleNamespace(embedding=192, input_size=112)

    def embed(self, images_NHWC, progress=None, normalise=True):
        assert not normalise
        assert images_NHWC.shape[1:] == (112, 112, 3)
        small = np.stack([cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA) for image in images_NHWC])
        return small.reshape(len(small), -1).astype(np.float32) - 127


@pytest.fixture
def ijb(photos, tmp_path):
    """Six people with two templates each, of 2 and 3 photos; crops twice the size, somewhere on a larger canvas."""
    root = tmp_path / "IJBX"
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    faces, points = [], []
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        canvas = np.full((300, 340, 3), 90, np.uint8)
        canvas[40:264, 50:274] = cv2.resize(decode(path.read_bytes()), (224, 224), interpolation=cv2.INTER_CUBIC)
        (root / "loose_crop" / f"{i}.jpg").write_bytes(encode(canvas))
        person, shot = divmod(i, 5)
        faces.append(f"{i}.jpg {100 + 2 * person + (shot > 1)} {shot % 2}")
        own = (POINTS * 2 + 0.5 + [50, 40]).ravel()
        points.append(f"{i}.jpg {' '.join(f'{x:.3f}' for x in own)} {0.5 + shot / 10}")
    pairs = [f"{100 + a} {100 + b} {int(a // 2 == b // 2)}" for a in range(12) for b in range(a + 1, 12)]
    (root / "meta" / "ijbx_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (root / "meta" / "ijbx_name_5pts_score.txt").write_text("\n".join(points) + "\n")
    (root / "meta" / "ijbx_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    head = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
    galleries = [[f"{100 + 2 * p},{p},x.jpg" for p in range(6) if p % 2 == part] for part in (0, 1)]
    for part, rows in enumerate(galleries, 1):
        (root / "meta" / f"ijbx_1N_gallery_G{part}.csv").write_text(head + "\n".join(rows) + "\n")
    probes = [f"{101 + 2 * p},{p},x.jpg" for p in range(6) for _ in range(3)]
    (root / "meta" / "ijbx_1N_probe_mixed.csv").write_text(head + "\n".join(probes) + "\n")
    return root


def test_templates_of_aligned_photos_are_told_apart(ijb, tmp_path):
    result = verify_templates(Pixels(), ijb, tmp_path / "out")
    assert (result.images, result.pairs, result.skipped) == (30, 66, 0)
    assert result.tar_at_far == {1e-1: 1.0}
    assert result.tar_at_far_of_means == {1e-1: 1.0}
    assert set(result.search) == {"gallery_g1", "gallery_g2"}
    assert [(s.mated, s.unmated, s.at_rank[1]) for s in result.search.values()] == [(3, 3, 1.0)] * 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"roc.png", "det.png"}
    figures = template_figures(result)
    assert figures["gallery_g1_rank_1"] == figures["tar_at_far_1e-1"] == 1.0


def test_templates_without_a_readable_image_are_left_out_and_counted(ijb):
    for i in (0, 1):  # all of template 100
        (ijb / "loose_crop" / f"{i}.jpg").write_bytes(b"broken")
    (ijb / "loose_crop" / "2.jpg").unlink()  # one of template 101's three
    result = verify_templates(Pixels(), ijb)
    assert result.failed == {
        "0.jpg": "unknown image format",
        "1.jpg": "unknown image format",
        "2.jpg": "missing",
    }
    assert (result.pairs, result.skipped) == (55, 11)
    assert result.search["gallery_g1"].mated == 3  # its person is still looked for, and missed
    assert result.search["gallery_g1"].at_rank == {1: pytest.approx(2 / 3)}


def test_bad_lists_are_named(ijb):
    meta = ijb / "meta"
    points = meta / "ijbx_name_5pts_score.txt"
    whole = points.read_text()
    points.write_text(whole.partition("\n")[2])
    with pytest.raises(UserError, match=r"0\.jpg has no line in the list of points"):
        verify_templates(Pixels(), ijb)
    points.write_text(whole.replace("0.5", "half", 1))
    with pytest.raises(UserError, match=r"ijbx_name_5pts_score\.txt: .*half"):
        verify_templates(Pixels(), ijb)
    points.unlink()
    with pytest.raises(UserError, match="expected one file"):
        verify_templates(Pixels(), ijb)
    points.write_text(whole)
    (meta / "ijbx_template_pair_label.txt").write_text("100 101 2\n")
    with pytest.raises(UserError, match="neither 0 nor 1"):
        verify_templates(Pixels(), ijb)
    (meta / "ijbx_template_pair_label.txt").write_text("100 101 1\n100 102 0\n")
    (meta / "ijbx_1N_probe_mixed.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n101,0\n101,1\n")
    with pytest.raises(UserError, match="a template of two people"):
        verify_templates(Pixels(), ijb)
