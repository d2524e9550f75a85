import zipfile

import numpy as np
import pytest

from fr_core.data.crops import encode
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from pipelines.ingest import ingest


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


def test_a_zip_of_the_folder_makes_the_same_shards(faces, tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted(faces.rglob("*.jpg")):
            archive.write(path, f"faces/{path.relative_to(faces)}")
    ingest(faces, tmp_path / "a", "flat", 16, on_ray=False)
    ingest(tmp_path / "faces.zip", tmp_path / "b", "flat", 16, on_ray=False)
    assert made(tmp_path / "a") == made(tmp_path / "b")
