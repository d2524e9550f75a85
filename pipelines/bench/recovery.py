"""``bigface bench recovery``: the cost of losing a worker, and of losing a node, in a run."""

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.synthetic import write_faces
from fr_core.errors import UserError
from fr_core.train.metrics import read_metrics
from fr_core.verify.pairs import write_pairs

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

CPUS: dict[str, Any] = {"num_cpus": 4}  # that each node claims, whatever the machine has
WORKERS = 2  # one on each node
LAST = 20  # steps whose mean loss is compared
PEOPLE, UNSEEN, SHOTS = 200, 100, 20  # drawn people to train on and to verify, and images of each

Run = dict[str, float]


def bench_recovery(steps: int, save_every: int, say: Callable[[str], None]) -> tuple[list[tuple[str, ...]], Run]:
    """Train three times on two nodes of this machine: undisturbed, with a killed worker, and with a killed node.

    The kill comes in the middle of the run, and nothing replaces the node. Runs train on drawn faces and end with a
    verification on unseen drawn people.

    Args:
        steps: steps of each run.
        save_every: steps between two checkpoints.
        say: function that shows a line of progress.

    Returns:
        A table with the header first, and its figures. CASE is worker or node:

        - ``seconds_CASE``: from the kill to the next trained step.
        - ``again_CASE``: steps that were trained twice.
        - ``loss_gap_CASE`` and ``accuracy_gap_CASE``: differences from the undisturbed run.
        - ``accuracy``: accuracy of the undisturbed run.
        - ``seconds_start``: from the undisturbed run's launch to its first step.

    Raises:
        UserError: a run did not finish, or lost a step.
    """
    with TemporaryDirectory(prefix="bigface-") as scratch:
        config = _config(Path(scratch), steps, save_every)
        calm = _undisturbed(config, Path(scratch) / "calm")
        say(f"undisturbed: first step after {calm['seconds']:.1f} s, loss {calm['loss']:.3f}, {calm['accuracy']:.1%}")
        figures = {"seconds_start": calm["seconds"], "accuracy": calm["accuracy"]}
        table: list[tuple[str, ...]] = [
            ("killed", "seconds to the next step", "steps again", "loss gap", "accuracy"),
            ("nothing", "", "0", "", f"{calm['accuracy']:.1%}"),
        ]
        for case in ("worker", "node"):
            hurt = _disturbed(config, Path(scratch) / case, case)
            say(f"{case} killed: next step after {hurt['seconds']:.1f} s, {hurt['again']:.0f} steps again")
            gaps = {name: hurt[name] - calm[name] for name in ("loss", "accuracy")}
            figures |= {f"{name}_gap_{case}": gap for name, gap in gaps.items()}
            figures |= {f"{name}_{case}": hurt[name] for name in ("seconds", "again")}
            cells = f"{hurt['seconds']:.1f}", f"{hurt['again']:.0f}", f"{gaps['loss']:+.3f}", f"{hurt['accuracy']:.1%}"
            table.append((case, *cells))
    return table, figures


def _config(scratch: Path, steps: int, save_every: int) -> Config:
    from pipelines.datasets.ingest import ingest

    faces, unseen = scratch / "faces", scratch / "unseen"
    write_faces(faces, PEOPLE, SHOTS)
    write_faces(unseen, UNSEEN, SHOTS, first_identity=PEOPLE)
    write_pairs(unseen, 300)
    ingest(faces / "images", scratch / "shards", on_ray=False)
    given = [f"train.max_steps={steps}", "train.epochs=100000", f"train.save_every={save_every}", "train.log_every=1"]
    given += [f"verify.images={unseen / 'images'}", f"verify.pairs={unseen / 'pairs.csv'}", "tracking.uri=off"]
    return load_config("debug_bigface", [f"data.path={scratch / 'shards'}", *given])


@contextmanager
def _two_nodes() -> Iterator[tuple["Cluster", "Node"]]:
    """Start a cluster of two raylets, and yield it with the node that is not its head."""
    import ray
    from ray.cluster_utils import Cluster

    cluster, before = Cluster(initialize_head=True, head_node_args=CPUS), os.environ.get("RAY_ADDRESS")
    node = cluster.add_node(**CPUS)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster, node
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _undisturbed(config: Config, out: Path) -> Run:
    with _two_nodes(), _training(config, out) as run:
        launched = time.monotonic()
        _wait(run, lambda: _step(out) > 0)
        return {"seconds": time.monotonic() - launched} | _ended(run, config, out)


def _disturbed(config: Config, out: Path, case: str) -> Run:
    with _two_nodes() as (cluster, node), _training(config, out) as run:
        _wait(run, lambda: _step(out) >= (config.train.max_steps or 0) // 2)
        life, reached, killed = _life(out), _step(out), time.monotonic()
        if case == "node":
            cluster.remove_node(node, allow_graceful=False)
        else:
            os.kill(_a_worker(), signal.SIGKILL)
        _wait(run, lambda: _life(out) != life)
        resumed = _step(out)
        _wait(run, lambda: _step(out) > resumed)
        seconds = time.monotonic() - killed
        return {"seconds": seconds, "again": float(reached - resumed)} | _ended(run, config, out)


@contextmanager
def _training(config: Config, out: Path) -> Iterator[Future[Run]]:
    """Train in a thread, since Ray adds and removes nodes in the main thread only."""
    from pipelines.train import train

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train, config, out, WORKERS)


def _ended(run: Future[Run], config: Config, out: Path) -> Run:
    """Return the mean of the last losses and the accuracy, after checking that the run has every step once."""
    accuracy = run.result()["accuracy"]
    rows = read_metrics(out)
    if [row["step"] for row in rows] != list(range(1, (config.train.max_steps or 0) + 1)):
        raise UserError(f"{out.name}: metrics.csv lacks steps or has some twice: run the bench again")
    return {"loss": statistics.fmean(row["loss"] for row in rows[-LAST:]), "accuracy": accuracy}


def _wait(run: Future[Run], happened: Callable[[], bool]) -> None:
    while not happened():
        if run.done():
            run.result()
            raise UserError("the run ended before the measurement did: give more --steps")
        time.sleep(0.05)


def _step(out: Path) -> int:
    """Return the last step in metrics.csv, 0 before the first."""
    with suppress(OSError, ValueError, KeyError):
        rows = read_metrics(out)
        return int(rows[-1]["step"]) if rows else 0
    return 0


def _life(out: Path) -> int:
    """Return a number that changes when a run resumes, once its metrics are cut to the checkpoint."""
    with suppress(OSError):
        return (out / "run.json").stat().st_mtime_ns
    return 0


def _a_worker() -> int:
    """Return the process id of a Ray Train worker on this cluster."""
    children = psutil.Process().children(recursive=True)
    return next(child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline()))
