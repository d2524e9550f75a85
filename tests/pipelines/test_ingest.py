import csv
import math
import re
import shutil
import tarfile
import zipfile

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_sample_images

from fr_core.data.crops import TEMPLATE, encode, similarity
from fr_core.data.detect import find_face
from fr_core.data.photos import read_rgb
from fr_core.data.recordio import list_records
from fr_core.data.schema import open_dataset
from fr_core.data.synthetic import render_face
from fr_core.errors import UserError
from pipelines.datasets.ingest import chunk_starts, ingest
from pipelines.datasets.merge import merge
from tests.helpers.commands import bigface
from tests.helpers.machine import REAL_DATA, needs_detector, needs_real_data
from tests.helpers.packed import payload, write_rec


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """40 identities × 16 images, several shards."""
    root = tmp_path_factory.mktemp("many") / "faces"
    random = np.random.default_rng(2)
    for identity in range(40):
        (root / f"id{identity:02d}").mkdir(parents=True)
        for shot in range(16):
            image = random.integers(0, 255, (16, 16, 3), np.uint8)
            (root / f"id{identity:02d}" / f"{shot:02d}.jpg").write_bytes(encode(image))
    return root


def made(out):
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.name != "manifest.json"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_a_stopped_ingest_goes_on_and_ends_as_if_it_had_not_been(faces, tmp_path, layout):
    def stop(done, total):
        if done > total / 2:
            raise Stop

    whole = ingest(faces, tmp_path / "whole", layout, 16, on_ray=False)
    with pytest.raises(Stop):
        ingest(faces, tmp_path / "a", layout, 16, on_ray=False, progress=stop)
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*.parquet")}
    assert 0 < len(written) < len(whole.shards)
    with pytest.raises(UserError, match="no manifest"):
        open_dataset(tmp_path / "a")
    assert ingest(faces, tmp_path / "a", layout, 16, on_ray=False) == whole
    assert made(tmp_path / "a") == made(tmp_path / "whole")
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == time for name, time in written.items())


def test_another_job_does_not_go_on_where_this_one_was_stopped(faces, tmp_path):
    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        ingest(faces, tmp_path / "a", "flat", 16, on_ray=False, progress=stop)
    with pytest.raises(UserError, match="is not empty; --overwrite"):
        ingest(faces, tmp_path / "a", "grouped", 16, on_ray=False)
    manifest = ingest(faces, tmp_path / "a", "grouped", 16, on_ray=False, overwrite=True)
    assert manifest.images == 640
    assert not list((tmp_path / "a").glob("shard-*.json"))


def test_what_a_cut_source_lost_is_counted_and_listed(photos, tmp_path):
    """Record 0 counts 30 images; the file ends inside the image of record 21."""
    faces = sorted(photos.rglob("*.jpg"))
    images = [payload(path.read_bytes(), i // 5, i + 1) for i, path in enumerate(faces)]
    path = write_rec(tmp_path / "train.rec", [payload(b"", 0, 0, (31, 37)), *images], index=False)
    path.write_bytes(path.read_bytes()[: list_records(path).starts_I[20] + 100])
    manifest = ingest(path, tmp_path / "shards", on_ray=False)
    assert (manifest.images, manifest.rejects) == (20, {"the file ends inside a record": 10})
    with (tmp_path / "shards" / "rejects.csv").open() as file:
        assert sorted(int(row["path"]) for row in csv.DictReader(file)) == list(range(21, 31))


def test_identities_are_cut_into_nearly_equal_chunks():
    """Against a loop. A chunk of one image is left only where the identity has one."""
    for chunk in (2, 3, 4, 6, 32):
        counts = np.arange(1, 80)
        starts = chunk_starts(np.cumsum(counts) - counts, int(counts.sum()), chunk)
        sizes = np.diff(starts, append=counts.sum()).tolist()
        for count in counts.tolist():
            own = [sizes.pop(0) for _ in range(math.ceil(count / chunk))]
            assert sum(own) == count
            assert max(own) <= chunk
            assert max(own) - min(own) <= 1
            assert min(own) > 1 or count == 1 or chunk == 2
        assert not sizes


def test_grouped_rows_have_as_many_images_as_asked(faces, tmp_path):
    """And merge cuts the rows of an older dataset, whose manifest does not say how large they are."""
    for chunk in (5, 32):
        manifest = ingest(faces, tmp_path / f"{chunk}", "grouped", 16, on_ray=False, chunk=chunk)
        assert manifest.chunk_images == chunk
        assert set(row_sizes(tmp_path / f"{chunk}")) == ({4} if chunk == 5 else {16})
    path = tmp_path / "32" / "manifest.json"
    path.write_text(re.sub(r',\s*"chunk_images": 32', "", path.read_text()))
    assert "chunk_images" not in path.read_text()
    assert open_dataset(tmp_path / "32").manifest.chunk_images == 32
    merge([tmp_path / "32"], tmp_path / "kept")
    assert (open_dataset(tmp_path / "kept").manifest.chunk_images, set(row_sizes(tmp_path / "kept"))) == (32, {16})
    bigface("merge", tmp_path / "32", "--out", tmp_path / "cut", "--chunk", 6, "--in-process")
    cut = open_dataset(tmp_path / "cut")
    assert (cut.manifest.chunk_images, cut.manifest.images) == (6, 640)
    assert set(row_sizes(tmp_path / "cut")) == {5, 6}


def row_sizes(root):
    opened = open_dataset(root)
    tables = [opened.read_row_group(shard, group) for shard, group, _ in opened.row_groups.tolist()]
    return [len(ids) for table in tables for ids in table["sample_ids"].to_pylist()]


def test_a_zip_of_the_folder_makes_the_same_shards(faces, tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted(faces.rglob("*.jpg")):
            archive.write(path, f"faces/{path.relative_to(faces)}")
    ingest(faces, tmp_path / "a", "flat", 16, on_ray=False)
    ingest(tmp_path / "faces.zip", tmp_path / "b", "flat", 16, on_ray=False)
    assert made(tmp_path / "a") == made(tmp_path / "b")


def page(faces, random):
    """A photo of 1000 × 750 with a large face, turned by up to 25 degrees, and small ones at its sides.

    Args:
        faces: crops on the template, the large one first.

    Returns:
        JPEG, and float32 [2, 3] that carries the large crop's pixels to the photo's.
    """
    image = cv2.resize(load_sample_images().images[random.integers(2)], (1000, 750))
    for number, face in reversed(list(enumerate(faces))):
        small = number > 0
        scale, degrees = (random.uniform(0.4, 0.8), 0) if small else (random.uniform(1.2, 4), random.uniform(-25, 25))
        matrix = cv2.getRotationMatrix2D((56, 56), degrees, scale)
        place = (90, 910)[number % 2] if small else random.uniform(380, 620), random.uniform(250, 500)
        matrix[:, 2] += np.array(place) - 56
        cv2.warpAffine(face, matrix, (1000, 750), dst=image, borderMode=cv2.BORDER_TRANSPARENT)
    return encode(image), matrix.astype(np.float32)


def pages(root, faces, random):
    """Photos of the people (name, crops) in folders, the matrix of each by its path."""
    matrices = {}
    crops = [crop for _, own in faces for crop in own]
    for name, own in faces:
        (root / name).mkdir(parents=True)
        for number, crop in enumerate(own):
            others = [crops[i] for i in random.integers(len(crops), size=2)]
            data, matrices[f"{name}/{number}.jpg"] = page([crop, *others], random)
            (root / name / f"{number}.jpg").write_bytes(data)
    return matrices


def rows(out):
    dataset = open_dataset(out)
    return [row for shard in dataset.manifest.shards for row in pq.read_table(out / shard.file).to_pylist()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Photos of 3 drawn people × 4, and one without a face."""
    root = tmp_path_factory.mktemp("drawn") / "people"
    pages(
        root, [(f"id{i}", [render_face(i, shot)[0] for shot in range(4)]) for i in range(3)], np.random.default_rng(3)
    )
    (root / "id1" / "view.jpg").write_bytes(encode(load_sample_images().images[0]))
    return root


@needs_detector
def test_photos_are_aligned_and_those_without_a_face_rejected(drawn, tmp_path):
    manifest = ingest(drawn, tmp_path / "a", on_ray=False, align=True)
    assert (manifest.images, manifest.rejects, manifest.warnings) == (12, {"no face": 1}, {})
    assert (tmp_path / "a" / "rejects.csv").read_text().split() == ["path,reason", "id1/view.jpg,no", "face"]
    for row in rows(tmp_path / "a"):
        assert read_rgb(row["image"]).shape == (112, 112, 3)
        assert np.abs(np.reshape(row["landmarks"], (5, 2)) - TEMPLATE).max() < 12


@needs_detector
def test_every_kind_of_source_is_aligned_alike(drawn, tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted(drawn.rglob("*.jpg")):
            archive.write(path, f"people/{path.relative_to(drawn)}")
    with tarfile.open(tmp_path / "faces.tar", "w") as archive:
        archive.add(drawn, "people")
    whole = ingest(drawn, tmp_path / "a", "grouped", align=True, on_ray=False)
    for name in ("faces.zip", "faces.tar"):
        again = ingest(tmp_path / name, tmp_path / f"shards of {name}", "grouped", align=True, on_ray=False)
        assert again.shards == whole.shards


@needs_detector
@pytest.mark.soak
@pytest.mark.ray
def test_ray_aligns_as_this_process_does(drawn, tmp_path):
    ingest(drawn, tmp_path / "a", align=True, on_ray=False)
    ingest(drawn, tmp_path / "b", align=True)
    one, other = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row["sample_id"] for row in one] == [row["sample_id"] for row in other]
    assert np.allclose([row["landmarks"] for row in one], [row["landmarks"] for row in other], atol=0.01)


@needs_detector
def test_an_ingest_without_alignment_is_not_gone_on_with(drawn, tmp_path):
    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        ingest(drawn, tmp_path / "a", on_ray=False, progress=stop)
    with pytest.raises(UserError, match="is not empty"):
        ingest(drawn, tmp_path / "a", on_ray=False, align=True)


def test_points_are_given_or_found_but_not_both(faces, tmp_path):
    with pytest.raises(UserError, match=r"--align finds the points that .*points\.csv holds"):
        ingest(faces, tmp_path / "a", landmarks=tmp_path / "points.csv", align=True)


@needs_detector
@needs_real_data
def test_real_faces_in_photos_land_on_the_template(tmp_path):
    """The set's crops lie on the template by its own points; where do their pixels lie after a photo's detour?"""
    random = np.random.default_rng(0)
    with tarfile.open(REAL_DATA / "faces" / "dev.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".jpg")]
        members = [members[i] for i in sorted(random.choice(len(members), 100, replace=False))]
        crops = [read_rgb(archive.extractfile(member).read()) for member in members]
    named = [(f"id{i:02d}", crops[i : i + 5]) for i in range(0, 100, 5)]
    matrices = pages(tmp_path / "photos", named, random)
    manifest = ingest(tmp_path / "photos", tmp_path / "shards", on_ray=False, align=True)
    assert manifest.images >= 98
    kept = {row["sample_id"]: row for row in rows(tmp_path / "shards")}
    errors = []
    for sample_id, (path, there) in enumerate(sorted(matrices.items())):
        if sample_id in kept:
            points = find_face(read_rgb((tmp_path / "photos" / path).read_bytes()))
            back = similarity(points, 112)
            moved = points @ back[:, :2].T + back[:, 2]
            assert np.allclose(np.reshape(kept[sample_id]["landmarks"], (5, 2)), moved, atol=0.01)
            photo = TEMPLATE @ there[:, :2].T + there[:, 2]
            errors.append(np.linalg.norm(photo @ back[:, :2].T + back[:, 2] - TEMPLATE, axis=1).mean())
    assert np.median(errors) < 3
    assert np.mean(np.array(errors) < 8) > 0.97


def test_loose_images_of_nobody_known_are_one_identity(photos, tmp_path):
    manifest = ingest(photos, tmp_path / "shards", on_ray=False, unlabelled=True)
    assert (manifest.images, manifest.identities) == (30, 1)
    assert open_dataset(tmp_path / "shards").identity_names() == ["(unlabelled)"]
    with pytest.raises(UserError, match="give one of the two"):
        ingest(photos, tmp_path / "more", on_ray=False, unlabelled=True, labels="list.csv")


def test_the_end_of_an_ingest_tells_what_became_of_the_photos_and_what_to_do_next(faces, tmp_path):
    photos = tmp_path / "my photos"
    shutil.copytree(faces, photos)
    (photos / "id00" / "broken.jpg").write_bytes(b"no image")
    (photos / "id00" / "empty.png").touch()
    (photos / "id01" / "notes.txt").touch()
    (photos / ".ipynb_checkpoints").mkdir()
    shutil.copy(photos / "id01" / "00.jpg", photos / ".ipynb_checkpoints" / "00.jpg")
    (photos / "id03" / "01.jpg").write_bytes((photos / "id03" / "01.jpg").read_bytes()[:-2])
    shutil.copy(photos / "id01" / "00.jpg", photos / "loose.jpg")
    for path in sorted((photos / "id02").iterdir())[1:]:
        path.unlink()
    out = tmp_path / "my shards"
    printed = bigface("ingest", photos, "--out", out, "--size", 16, "--in-process")
    lines = printed.splitlines()
    assert lines[-1] == f"next: bigface split '{out}' --out '{out}-split'"
    reasons = f"1 empty file, 1 unknown image format; listed in {out / 'rejects.csv'}"
    assert lines[-2] == f"{out}: 625 images of 40 people; 2 images left out: {reasons}"
    assert "warning: 1 person has one image only" in lines[-3]
    for reason in (".txt files", "files in hidden, @ and trash folders", "photos in no person's folder"):
        assert f"passed over: {reason}: 1" in lines
    assert "repaired: 1 JPEG without an end, or with extra bytes" in lines
    assert "people: id00, id01, id02, id03, id04 … id35, id36, id37, id38, id39" in lines
    assert sum("figure" in line for line in lines) == 1


def test_the_next_command_after_an_ingest_is_one_that_works(faces, tmp_path):
    few = tmp_path / "few"
    for folder in sorted(faces.iterdir())[:7]:
        shutil.copytree(folder, few / folder.name)
    printed = bigface("ingest", few, "--out", tmp_path / "a", "--size", 16, "--in-process")
    assert printed.splitlines()[-1] == f"next: bigface inspect {tmp_path / 'a'} --out {tmp_path / 'a-looks'}"
    printed = bigface("ingest", few, "--out", tmp_path / "b", "--size", 16, "--in-process", "--unlabelled")
    assert "112 images of unknown people; 0 images left out" in printed
    assert printed.splitlines()[-1].startswith("next: bigface distill RECIPE")
