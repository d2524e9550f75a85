"""Ingest, training and verification where all that is read and left lies on an object store."""

import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data.store import find_paths
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.open import open_net
from fr_core.train.metrics import read_metrics
from pipelines.datasets.ingest import ingest, write_one
from pipelines.datasets.inspect import inspect
from pipelines.datasets.unpack import unpack
from pipelines.train import train
from tests.helpers.commands import bigface
from tests.helpers.containers import example, msgpack_entries, save_to_disk, write_lmdb, write_tfrecord
from tests.helpers.datasets import put
from tests.helpers.packed import payload, write_rec


def content(folder):
    return {file.name: file.read_bytes() for file in find_paths(folder, "*") if file.is_file()}


class Stop(Exception):
    pass


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_ingest_makes_the_same_dataset_at_a_url_and_goes_on(photos, bucket, tmp_path, monkeypatch, layout):
    def stop(done, total):
        raise Stop

    def counted(job, number):
        made.append(number)
        return write_one(job, number)

    made = []
    monkeypatch.setattr("pipelines.datasets.ingest.write_one", counted)
    monkeypatch.setattr("pipelines.datasets.ingest.GROUP_IMAGES", 10)  # of a shard at least
    here = ingest(photos, tmp_path / "here", layout, on_ray=False)
    with pytest.raises(Stop):
        ingest(photos, bucket / "there", layout, on_ray=False, progress=stop)
    assert {file.suffix for file in find_paths(bucket / "there", "shard-*")} == {".json", ".parquet"}
    with pytest.raises(UserError, match="is not empty; --overwrite"):
        ingest(photos, bucket / "there", layout, image_size=64, on_ray=False)
    assert ingest(photos, str(bucket / "there"), layout, on_ray=False) == here
    assert content(bucket / "there") == content(tmp_path / "here")
    assert sorted(made) == sorted([*range(len(here.shards))] * 2)  # here, and there in two lives
    assert len(here.shards) > 1
    with pytest.raises(UserError, match="lie in each other"):
        ingest(put(photos, bucket / "photos"), bucket / "photos" / "shards", on_ray=False)


def as_zip(photos, out):
    with zipfile.ZipFile(out / "people.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.write(path, path.relative_to(photos.parent))
    return out / "people.zip"


def as_tars(photos, out):
    (out / "tars").mkdir()
    for name, people in (("a", "[0-2]"), ("b", "[3-9]")):
        with tarfile.open(out / "tars" / f"{name}.tar", "w") as archive:
            for path in sorted(photos.glob(f"person{people}/*.jpg")):
                archive.add(path, path.relative_to(photos))
    return out / "tars"


def as_webdataset(photos, out):
    shards = out / "shards"
    ingest(photos, shards, on_ray=False)
    unpack(shards, out / "tars", "webdataset")
    (out / "tars" / "identities.csv").unlink()
    return out / "tars"


def as_rec(photos, out):
    images = [(path.read_bytes(), int(path.parent.name[-1])) for path in sorted(photos.rglob("*.jpg"))]
    payloads = [payload(image, float(label), number) for number, (image, label) in enumerate(images)]
    return write_rec(out / "train.rec", payloads, index=False)


def as_lmdb(photos, out):
    faces = [(path.read_bytes(), int(path.parent.name[-1])) for path in sorted(photos.rglob("*.jpg"))]
    (out / "lmdb").mkdir()
    write_lmdb(out / "lmdb" / "faces.lmdb", msgpack_entries(faces))
    (out / "lmdb" / "faces.lmdb-lock").unlink()
    return out / "lmdb"


def as_tfrecords(photos, out):
    faces = sorted(photos.rglob("*.jpg"))
    examples = [example(image=path.read_bytes(), label=path.parent.name.encode()) for path in faces]
    for number, part in enumerate((examples[:11], examples[11:])):
        write_tfrecord(out / "tf" / f"train-{number}.tfrecord", part)
    return out / "tf"


def as_saved_dataset(photos, out):
    faces = sorted(photos.rglob("*.jpg"))
    table = pa.table({"image": [path.read_bytes() for path in faces], "label": [path.parent.name for path in faces]})
    return save_to_disk(out / "saved", [table], {})


def as_table_of_paths(photos, out):
    put(photos, out / "named" / "images")
    paths = [f"images/{path.relative_to(photos)}" for path in sorted(photos.rglob("*.jpg"))]
    (out / "named" / "data").mkdir()
    table = pa.table({"file_name": [*paths, "../../x.jpg"], "label": [*(path.split("/")[1] for path in paths), "x"]})
    pq.write_table(table, out / "named" / "data" / "train.parquet")
    return out / "named"


def as_list(photos, out):
    put(photos, out / "loose")
    lines = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.rglob("*.jpg"))]
    (out / "loose" / "list.csv").write_text("\n".join(["path,identity", *lines]) + "\n")
    return out / "loose"


@pytest.mark.parametrize(
    "packed",
    [
        None,
        as_zip,
        as_tars,
        as_webdataset,
        as_rec,
        as_lmdb,
        as_tfrecords,
        as_saved_dataset,
        as_table_of_paths,
    ],
)
def test_sources_at_a_url_are_read_as_local_ones(photos, bucket, tmp_path, packed):
    source = packed(photos, tmp_path) if packed else photos
    here = ingest(source, tmp_path / "a", on_ray=False)
    remote = put(source, bucket / source.name)
    there = ingest(str(remote), tmp_path / "b", on_ray=False)
    assert there == here.model_copy(update={"source": str(remote)})
    assert here.images == 30
    del (first := content(tmp_path / "a"))["manifest.json"], (second := content(tmp_path / "b"))["manifest.json"]
    assert first == second


def test_a_list_at_a_url_names_images_beside_it_and_a_missing_one_is_a_reject(photos, bucket, tmp_path):
    remote = put(as_list(photos, tmp_path), bucket / "loose")
    (remote / "person0/0.jpg").unlink()
    manifest = ingest(remote / "list.csv", bucket / "shards", on_ray=False)
    assert (manifest.images, manifest.rejects) == (29, {"No such file or directory": 1})
    assert b"person0/0.jpg,No such file" in (bucket / "shards" / "rejects.csv").read_bytes()


def config_of(data, *overrides):
    base = [f"data.path={data}", "tracking.uri=off", "data.lanes=8", "train.save_every=7"]
    return load_config("debug_bigface", [*base, *overrides])


def test_a_run_at_a_url_resumes_bit_for_bit_and_is_opened_by_every_command(dataset, bucket, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    shards, out = put(dataset, bucket / "shards"), bucket / "runs" / "a"
    train(config_of(dataset), tmp_path / "run", in_process=True)

    def dying(config, state, batch, ranks):
        if state.step == 11:
            raise Stop
        return step(config, state, batch, ranks)

    step = loop.step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", dying)
        with pytest.raises(Stop):
            train(config_of(shards), out, in_process=True)
    weights = checkpoints(tmp_path / "run")[0] / "backbone.safetensors"
    put(weights, out / "checkpoints" / "step_00000009" / weights.name)  # as of a worker that dies while it saves
    assert [path.name for path in checkpoints(out)] == ["step_00000007"]
    with pytest.raises(UserError, match="holds a run: --resume"):
        train(config_of(shards), out, in_process=True)
    train(config_of(shards), out, in_process=True, resume=True)
    assert [row["loss"] for row in read_metrics(out)] == [row["loss"] for row in read_metrics(tmp_path / "run")]
    saved, local = checkpoints(out)[-1], checkpoints(tmp_path / "run")[-1]
    for name in ("backbone.safetensors", "head_00000.safetensors"):
        assert (saved / name).read_bytes() == (local / name).read_bytes()
    assert {file.name for file in find_paths(out, "*")} == {file.name for file in find_paths(tmp_path / "run", "*")}
    assert [file.name for file in find_paths(out / "pictures", "*.png")] == ["curves.png", "sample_batch.png"]

    faces = np.random.default_rng(0).integers(0, 255, (4, 112, 112, 3), np.uint8)
    assert np.array_equal(open_net(str(out)).embed(faces), open_net(tmp_path / "run").embed(faces))
    assert np.array_equal(open_net(saved / "backbone.safetensors").embed(faces), open_net(saved).embed(faces))
    assert inspect(shards) == inspect(dataset)
    warm = [f"init.backbone={put(weights, bucket / weights.name)}", "train.max_steps=1"]
    train(config_of(shards, *warm), out, in_process=True, overwrite=True)
    assert [path.name for path in checkpoints(out)] == ["step_00000001"]


def test_mistakes_at_the_command_line(bucket, dataset, tmp_path):
    with pytest.raises(UserError, match=r"s3://no-such-bucket/\S+: .*bucket does not exist"):
        bigface("train", "debug_bigface", f"data.path={dataset}", "--in-process", "--out", "s3://no-such-bucket/run")
    with pytest.raises(UserError, match=r"s3://no-such-bucket/shards: no such folder"):
        bigface("inspect", "s3://no-such-bucket/shards")
    with pytest.raises(UserError, match=r"s3://bucket/x: this option takes a local path, not a URL"):
        bigface("unpack", dataset, "--out", "s3://bucket/x")


@pytest.mark.soak
@pytest.mark.ray
def test_a_search_at_a_url_leaves_there_what_a_local_one_leaves_and_goes_on(dataset, bucket, tmp_path):
    shards, out = put(dataset, bucket / "shards"), bucket / "search"
    given = ["debug_bigface", f"data.path={shards}", "tracking.uri=off", "train.max_steps=6", "--only", "lr,m3"]
    options = ["--objective", "loss", "--stop", "none", "--in-process", "--trials", 3]
    bigface("tune", "bigface", *given, *options, "--minutes", 0, "--out", out)
    bigface("tune", "bigface", *given, *options, "--resume", "--out", out, "--json", tmp_path / "tune.json")
    found = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert [trial["state"] for trial in found] == ["finished"] * 3
    assert {path.parent.name for path in find_paths(out / "trials", "*/report.json")} == {
        trial["name"] for trial in found
    }
    assert {"trials.csv", "winner.toml", "parallel.png", "importance.png"} <= {
        file.name for file in find_paths(out, "*.*")
    }
    (tmp_path / "winner.toml").write_text((out / "winner.toml").read_text())
    assert load_config(tmp_path / "winner.toml").optim.lr in [trial["values"]["lr"] for trial in found]
