"""Datasets on the hub are read as local folders are; what it refuses is told in one line."""

import builtins
import contextlib
import json
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fr_core.data.hub import split_hub_url
from fr_core.data.listing import read_image
from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_source
from fr_core.data.store import RemoteBytes, _filesystem, find_paths, local_copy, to_path, write_text_atomically
from fr_core.errors import StorageError, UserError
from pipelines.datasets.ingest import ingest
from tests.helpers.hub import Hub
from tests.helpers.packed import make_tar


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    _filesystem.cache_clear()  # it holds those of another test's hub
    yield server
    server.close()


def export(hub, name, photos, revision="main"):
    """The photos in the layout of the hub: ``data/`` with a file for each split."""
    faces = sorted(photos.rglob("*.jpg"))
    folder = hub.root / name / revision
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("faces")
    for split, part in (("train-00000-of-00001", faces[:20]), ("test-00000-of-00001", faces[20:])):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in part]
        table = pa.table({"image": cells, "label": [path.parent.name for path in part]})
        pq.write_table(table, folder / "data" / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("url", "place", "parts"),
    [
        ("hf://datasets/o/n", "hf://datasets/o/n", ()),
        ("hf://datasets/o/n/", "hf://datasets/o/n", ()),
        ("hf://datasets/o/n/a b/c.parquet", "hf://datasets/o/n", ("a b", "c.parquet")),
        ("hf://datasets/o/n@v1.0/a", "hf://datasets/o/n@v1.0", ("a",)),
        ("hf://datasets/o/n/a/b@v1.0", "hf://datasets/o/n@v1.0", ("a", "b")),
        ("hf://datasets/o/n@main/a@b.jpg", "hf://datasets/o/n@main", ("a@b.jpg",)),
        ("hf://datasets/o/n@refs/convert/parquet/default", "hf://datasets/o/n@refs%2Fconvert%2Fparquet", ("default",)),
        ("hf://datasets/o/n@refs%2Fpr%2F1", "hf://datasets/o/n@refs%2Fpr%2F1", ()),
    ],
)
def test_urls_of_the_hub(url, place, parts):
    assert split_hub_url(url) == (place, parts)
    path = to_path(url)
    assert (path.anchor, path.parts) == (place, parts)
    assert to_path(str(path)) == path


@pytest.mark.parametrize("url", ["hf://o/n", "hf://datasets/n", "hf://spaces/o/n", "hf://", "hf://datasets//n/a"])
def test_other_urls_of_the_hub_are_refused(url):
    with pytest.raises(UserError, match=r"only datasets are read from the hub; expected hf://datasets/OWNER/NAME"):
        to_path(url)


def test_a_dataset_is_ingested_as_its_local_copy_is(hub, photos, tmp_path):
    folder = export(hub, "o/n", photos)
    export(hub, "o/n", photos, "refs/convert/parquet")
    here = ingest(folder, tmp_path / "here", on_ray=False)
    assert here.images == 30
    for number, place in enumerate(("", "/data", "@main", "@refs/convert/parquet", "/data@main")):
        there = ingest(f"hf://datasets/o/n{place}", tmp_path / f"there{number}", on_ray=False)
        assert there.model_copy(update={"source": here.source}) == here


def test_loose_photos_archives_and_ranges(hub, photos, tmp_path):
    main = hub.root / "o/photos/main"
    shutil.copytree(photos, main / "people")
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(photos.rglob("*.jpg"))}
    make_tar(main / "people.tar", files)
    url = "hf://datasets/o/photos"
    listing, local = list_source(f"{url}/people"), list_source(photos)
    assert (listing.names, listing.paths) == (local.names, local.paths)
    row = listing.images.to_pylist()[7]
    assert read_image(listing.kind, listing.files[0], row["path"], 0, 0) == (photos / row["path"]).read_bytes()
    root = to_path(url)
    assert [path.name for path in find_paths(root, "*")] == ["people", "people.tar"]
    assert list_source(root / "people.tar").paths == local.paths
    assert [path.name for path in find_paths(root / "people", "person1/*.jpg")] == [f"{i}.jpg" for i in range(5)]
    photo = root / "people/person0/0.jpg"
    data = (photos / "person0/0.jpg").read_bytes()
    assert (photo.is_file(), photo.is_dir(), photo.stat().st_size) == (True, False, len(data))
    assert (photo.parent.is_dir(), (root / "none").exists(), (root / "none/x").exists()) == (True, False, False)
    ranges = RemoteBytes(photo)
    assert (len(ranges), ranges[5:90], ranges[90:5]) == (len(data), data[5:90], b"")
    with local_copy(photo) as copy:
        assert copy.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        (root / "none").read_bytes()


def test_shards_on_the_hub_are_opened_and_sent_to_other_processes(hub, dataset):
    shutil.copytree(dataset, hub.root / "o/shards/main")
    opened, local = open_dataset("hf://datasets/o/shards"), open_dataset(dataset)
    assert opened.manifest == local.manifest
    assert opened.read_row_group(1, 2).equals(local.read_row_group(1, 2))
    opened.check_sha256()
    path = pickle.loads(pickle.dumps(to_path("hf://datasets/o/shards/manifest.json")))
    assert path.read_bytes() == (dataset / "manifest.json").read_bytes()
    filesystem = pickle.loads(pickle.dumps(path.filesystem))
    with filesystem.open_input_file(path.key) as file:
        assert file.read() == (dataset / "manifest.json").read_bytes()


def test_a_private_dataset_needs_a_token(hub, photos, monkeypatch, tmp_path):
    export(hub, "o/private", photos)
    hub.secret["o/private"] = "hf_secret"
    for place, token in (("", ""), ("/data", "hf_wrong")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            StorageError, match=r"^hf://datasets/o/private: no such dataset, or a private one; .*HF_TOKEN$"
        ):
            list_source(f"hf://datasets/o/private{place}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(list_source("hf://datasets/o/private", scratch=tmp_path / "scratch").paths) == 30


def test_what_the_hub_refuses(hub, photos, monkeypatch, tmp_path):
    export(hub, "o/n", photos)
    export(hub, "o/gated", photos)
    hub.gated.add("o/gated")
    for url, message in (
        ("hf://datasets/o/none", "no such dataset, or a private one"),
        ("hf://datasets/o/gated", "its owner grants access; ask for it"),
        ("hf://datasets/o/n@v9", "the dataset has no such revision"),
        ("hf://datasets/o/..", "the hub does not answer: "),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            list_source(url, scratch=tmp_path / "scratch")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="hf://datasets/o/n/none: no such file or folder"):
        list_source("hf://datasets/o/n/none")
    with pytest.raises(StorageError, match="datasets on the hub are only read"):
        to_path("hf://datasets/o/n/README.md").unlink()
    with pytest.raises(StorageError, match="datasets on the hub are only read"):
        write_text_atomically(to_path("hf://datasets/o/n/x"), "text")


def test_an_answer_that_is_no_listing(hub, photos):
    export(hub, "o/n", photos)
    for page in (b"<html>Sign in</html>", b"[{}]", b"[1]", b'{"a": 1}'):
        hub.change = lambda listed, page=page: page
        _filesystem.cache_clear()
        with pytest.raises(StorageError, match=r"^hf://datasets/o/n\S*: the hub's answer is damaged"):
            list_source("hf://datasets/o/n")


@pytest.mark.parametrize("fault", ["broken", "away"])
def test_a_hub_that_fails_is_not_taken_for_an_empty_one(hub, photos, monkeypatch, fault):
    folder = export(hub, "o/n", photos)
    path, other = to_path("hf://datasets/o/n/data"), to_path("hf://datasets/o/n")
    assert other.is_dir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again after seconds
    setattr(hub, fault, True)
    calls = [lambda: list(path.iterdir()), path.exists, (other / "README.md").read_bytes]
    for call in (*calls, lambda: list_source("hf://datasets/o/other")):
        with pytest.raises(StorageError, match=r"^hf://datasets/o/") as caught:
            call()
        assert "\n" not in str(caught.value)
    setattr(hub, fault, False)
    assert (folder / "README.md").read_bytes() == (other / "README.md").read_bytes()


def test_the_hub_switched_off(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="hf://datasets/o/n: the hub is switched off by HF_HUB_OFFLINE; unset it"):
        list_source("hf://datasets/o/n")


def test_without_the_library_the_extra_is_named(monkeypatch):
    def missing(name, *rest):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"hf://datasets/o/unread: to read from the hub, pip install 'bigface\[hub\]'"):
        list_source("hf://datasets/o/unread")


FIELDS = ["type", "path", "size", "oid"]
VALUES = (
    st.sampled_from(["file", "directory", "data", "", "..", "data/../..", "/etc", "a.parquet"])
    | st.integers()
    | st.none()
)


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(FIELDS), VALUES), max_size=3),
    cut=st.none() | st.floats(0, 1),
)
def test_any_listing_is_read_or_refused(hub, tmp_path, edits, cut):
    def change(listed):
        entries = json.loads(listed)
        for place, field, value in edits:
            entries[place % len(entries)][field] = value
        data = json.dumps(entries).encode()
        return data if cut is None else data[: int(cut * len(data))]

    for name in ("a.csv", "data/0.jpg"):
        (hub.root / "o/n/main" / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.root / "o/n/main" / name).write_bytes(b"face")
    hub.change = change
    _filesystem.cache_clear()
    with contextlib.suppress(UserError):
        list_source("hf://datasets/o/n", scratch=tmp_path / "scratch")
