"""Fixtures, and in what order and where tests run."""

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import settings
from pyarrow.fs import FileSystem

from fr_core.data.crops import encode
from fr_core.data.store import RemotePath, to_path
from tests.helpers.datasets import write_dataset

settings.register_profile("default", deadline=None)  # machines here are noisy
settings.register_profile("fuzz", deadline=None, max_examples=10_000)
settings.load_profile("default")

collect_ignore = [] if "BIGFACE_EXTENDED" in os.environ else ["extended"]
LONG = ["tests", "train", "pipelines", "pretend_card"]  # folders whose files take the longest
RANKS = ["tests.helpers.ranks", "tests.helpers.runs", "tests.helpers.killed"]
mp.get_context("forkserver").set_forkserver_preload(RANKS)  # with the loop: imported once, for all ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soaks run only when asked for; tests of Ray one after the other, where several processes test.

    They come first, then the long files: at the end there are short ones to share out.
    """
    items.sort(key=lambda item: ("ray" not in item.keywords, item.path.parent.name not in LONG, item.path.parent.name))
    for item in items:
        if "ray" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("ray"))
        if "soak" in item.keywords and "soak" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="minutes long: make soak"))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last test of Ray its node ends, which else would be busy with itself to the end."""
    if "ray" in item.keywords and not (nextitem and "ray" in nextitem.keywords):
        import ray

        ray.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share its fixtures, so one process has them all; those of Ray are a group of their own."""
    from xdist.scheduler import LoadGroupScheduling

    class OneFileAProcess(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    config.option.loadscopereorder = False  # by number of tests, it would be
    return OneFileAProcess(config, log)


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


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow, to be copied: to make its tables takes longer than a small run."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of 6 identities × 5 JPEG crops of 112 × 112; a test that changes it works on a copy."""
    root = tmp_path_factory.mktemp("photos") / "people"
    random = np.random.default_rng(1)
    for identity in range(6):
        folder = root / f"person{identity}"
        folder.mkdir(parents=True)
        base = random.integers(0, 255, (7, 7, 3))
        for shot in range(5):
            image = np.kron(base, np.ones((16, 16, 1))) + random.normal(0, 10, (112, 112, 3))
            (folder / f"{shot}.jpg").write_bytes(encode(np.clip(image, 0, 255).astype(np.uint8)))
    yield root
    assert len(list(root.rglob("*"))) == 6 + 6 * 5, "a test changed the photos of all"
