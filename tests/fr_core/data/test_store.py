"""URLs read and write as local paths do; what storage refuses is told in one line."""

import pickle
import time
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSystem

from fr_core.data.schema import open_dataset
from fr_core.data.store import (
    PAUSES,
    RemoteBytes,
    RemotePath,
    _ask_store,
    atomic_file,
    find_paths,
    local_copy,
    remove_folder,
    to_path,
    write_text_atomically,
)
from fr_core.errors import StorageError, UserError
from tests.helpers.datasets import flip_a_bit, put


def test_a_url_is_a_remote_path_and_anything_else_a_local_one():
    assert to_path("runs/a") == Path("runs/a")
    assert to_path("file:///data/a b") == Path("/data/a b")
    path = to_path("s3://bucket/runs//a.tar.gz?region=eu-west-1&scheme=http")
    assert str(path) == "s3://bucket/runs/a.tar.gz?region=eu-west-1&scheme=http"
    assert to_path(str(path)) == pickle.loads(pickle.dumps(path)) == path == path.resolve()
    assert (path.name, path.stem, path.suffix, path.suffixes) == ("a.tar.gz", "a.tar", ".gz", [".tar", ".gz"])
    assert path.parent / "b/c" == to_path("s3://bucket/runs/b/c?region=eu-west-1&scheme=http")
    assert [p.name for p in path.parents] == ["runs", "bucket"]
    assert path.parent < path


def test_what_is_no_url_of_a_store_is_refused():
    with pytest.raises(UserError, match="no bucket"):
        to_path("s3:///shards")
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as caught:
        to_path("s3://name:secret@bucket/shards")
    assert "secret@" not in str(caught.value)
    with pytest.raises(UserError, match="foo://bucket: Unrecognized filesystem"):
        open_dataset("foo://bucket/shards")
    with pytest.raises(UserError, match="Unexpected query parameter"):
        open_dataset("s3://bucket/shards?color=red")


def test_a_remote_folder_is_seen_as_a_local_one(bucket, tmp_path):
    for name in ("a.txt", "b c/1.txt", "b c/2.csv", "b c/deep/3.txt", "d/4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    put(tmp_path, bucket / "folder")

    def seen(root):
        kinds = {
            name: ((root / name).exists(), (root / name).is_file(), (root / name).is_dir())
            for name in ("a.txt", "b c", "b c/1.txt", "none", "b c/none", "b")
        }
        lists = [
            find_paths(root, pattern) for pattern in ("*", "*.txt", "*/*.txt", "b c/*.txt", "[a-c]*/?.*", "none/*")
        ]
        lists += [sorted(root.iterdir()), sorted((root / "b c").rglob("*")), sorted(root.rglob("*.txt"))]
        names = [[str(path.relative_to(root)) for path in found] for found in lists]
        sizes = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
        return kinds, names, sizes, (root / "b c/1.txt").read_text(), (root / "b c/1.txt").stat().st_size

    assert seen(bucket / "folder") == seen(tmp_path)
    for missing in (bucket / "none", tmp_path / "none"):
        with pytest.raises(FileNotFoundError):
            missing.read_bytes()
        with pytest.raises(FileNotFoundError):
            missing.unlink()
        missing.unlink(missing_ok=True)
        remove_folder(missing)
    for root in (bucket / "folder", tmp_path):
        remove_folder(root / "b c")
        (root / "a.txt").unlink()
    for root in (bucket / "folder", tmp_path):
        assert [path.name for path in find_paths(root, "*")] == ["d"]


def test_a_file_is_whole_or_absent_and_brought_here_to_be_read(bucket, tmp_path):
    for root in (bucket, tmp_path):
        with pytest.raises(ZeroDivisionError), atomic_file(root / "numbers") as part:
            part.write_bytes(bytes([1 // len(b"")]))
        assert not (root / "numbers").exists()
        with atomic_file(root / "numbers") as part:
            part.write_bytes(bytes(range(100)))
            assert not (root / "numbers").exists()
        with local_copy(root / "numbers") as copy:
            assert copy.read_bytes() == (root / "numbers").read_bytes() == bytes(range(100))
        with pytest.raises(UserError, match=f"^{root}/numbers: bad$"), local_copy(root / "numbers") as copy:
            raise UserError(f"{copy}: bad")
    data, all_of_it = RemoteBytes(bucket / "numbers"), bytes(range(100))
    for part in (slice(3, 9), slice(95, 200), slice(100, 120), slice(9, 3), slice(None, 4)):
        assert data[part] == all_of_it[part]
    assert len(data) == 100


def one_line(caught):
    return "\n" not in str(caught.value) and "Request ID" not in str(caught.value)


def test_a_wrong_bucket_and_a_dead_endpoint_are_named_soon(s3, monkeypatch):
    """A dead one is asked once here, not as often as there are pauses and once more."""
    wrong = to_path("s3://no-such-bucket/runs")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/runs/a: .*bucket does not exist") as caught:
        write_text_atomically(wrong / "a", "text")
    assert one_line(caught)
    assert not (wrong / "a").exists()
    monkeypatch.setattr(_ask_store, "__defaults__", ((),))
    began = time.monotonic()
    dead = RemotePath("s3://bucket", ("runs",), "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(StorageError, match="Could not connect") as caught:
        dead.exists()
    assert one_line(caught)
    assert (time.monotonic() - began) * (len(PAUSES) + 1) + sum(PAUSES) < 60


def test_a_damaged_shard_is_told_from_storage_that_fails(bucket, dataset, tmp_path, monkeypatch):
    put(dataset, tmp_path / "shards")
    flip_a_bit(tmp_path / "shards" / "shard-00000.parquet", 5000)
    opened = open_dataset(str(put(tmp_path / "shards", bucket / "shards")))
    with pytest.raises(UserError, match=rf"shard {bucket}/shards/shard-00000\.parquet is damaged") as caught:
        opened.read_row_group(0, 0)
    assert not isinstance(caught.value, StorageError)
    with pytest.raises(UserError, match=rf"{bucket}/shards/shard-00000\.parquet: wrong checksum"):
        opened.check_sha256()

    def lost(*args, **kwargs):
        raise OSError("connection reset")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group", lost)
    with pytest.raises(StorageError, match=r"shard-00001\.parquet: connection reset"):
        opened.read_row_group(1, 0)
    (bucket / "shards" / "shard-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet is missing"):
        open_dataset(bucket / "shards")


class Server:
    """S3 on a port of its own that can go away and come back with what it held."""

    def __init__(self):
        self.port, self.server = 0, None

    def start(self):
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]


def test_a_store_that_is_away_for_seconds_is_asked_again(tmp_path, monkeypatch):
    """It comes back in the pause after the first try."""
    server = Server()
    server.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    url = f"s3://tried/run?scheme=http&endpoint_override=127.0.0.1:{server.port}"
    FileSystem.from_uri(f"{url}&allow_bucket_creation=true")[0].create_dir("tried")
    path = to_path(url) / "file"
    server.server.stop()
    monkeypatch.setattr(time, "sleep", lambda seconds: server.start())
    write_text_atomically(path, "whole")
    assert path.read_text() == "whole"
    server.server.stop()
    with pytest.raises(StorageError, match=r"s3://tried/run/file\S*: .*NETWORK_CONNECTION"):
        _ask_store(path, lambda: path.filesystem.get_file_info(path.key), pauses=())
