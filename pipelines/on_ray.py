"""The same loop on Ray: one local node by default, or the cluster that ``RAY_ADDRESS`` names."""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fr_core.config import Config
from fr_core.config.recipes import parse_config
from fr_core.data.store import AnyPath, RemotePath, find_paths, to_path, write_text_atomically
from fr_core.errors import RunStopped, StorageError, UserError
from fr_core.train.notice import Notice
from pipelines.gauges import Gauges
from pipelines.logs import log, log_event, start_logging
from pipelines.signals import on_signal

if TYPE_CHECKING:
    from ray.train import UserCallback

START_ATTEMPTS = 3
MAX_FAILURES = 5  # deaths of workers after which there must be a new checkpoint
STOP_REQUEST = ".leave"  # a file in the run's folder: the driver was asked to leave
MISTAKES = ".mistake_*.txt"  # files there: the user's, which a worker found
LOOK_EVERY = 2.0  # seconds
RESIZE_EVERY = 60.0  # seconds between looks for more machines
GROWS_AS = "ray_bootstrap_config.yaml"  # where `ray up` tells the head, in its home, what its autoscaler may start

Resources = dict[str, float]
Row = dict[str, Any]  # of Ray Data


def start_ray(dashboard: bool = False) -> None:
    """Joins the cluster of ``RAY_ADDRESS``, or starts a node of its own that ends with this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets any other process starve the training
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    for attempt in range(START_ATTEMPTS):
        if ray.is_initialized():
            return
        try:
            ray.init(
                address=address,
                include_dashboard=dashboard if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS={address}: no cluster answers there: {str(error).splitlines()[0]}") from None
        except Exception as error:  # Ray has no class for it: a busy machine needs more than the 30 s that it waits
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise


def mapped(rows: list[Row], work: Callable[..., Any], **options: Any) -> Iterator[Row]:
    """What ``work``, a function or an actor's class, makes of each row, by Ray Data and in any order.

    Raises:
        UserError: as ``work`` does, in one line.
    """
    start_ray()
    import ray
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield from ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(work, **options).iter_rows()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause).splitlines()[0]) from None  # Ray adds lines of its own
        raise


def worker_cpus(machines: Sequence[Resources], workers: int) -> float:
    """CPUs that each worker reserves, so that at least half are left to Ray Data: also of those that are left when the
    largest of several machines dies.
    """
    sizes = sorted(machine.get("CPU", 0) for machine in machines if machine.get("CPU", 0))
    return min(1.0, sum(sizes[: max(1, len(sizes) - 1)]) / (2 * workers))


def threads_of_each(processes: int, here: int = 1) -> int:
    """Threads of each of the processes that train on the cluster, so that those of a node share its CPUs.

    A node's CPUs are as Ray counts them: in a container its share of the machine's.

    Args:
        processes: on the whole cluster.
        here: those that are known to be on this node.
    """
    import ray

    own, nodes = ray.get_runtime_context().get_node_id(), [node for node in ray.nodes() if node["Alive"]]
    counted = next(node["Resources"].get("CPU", 0) for node in nodes if node["NodeID"] == own)
    training = sum(node["Resources"].get("CPU", 0) > 0 for node in nodes)
    cpus = min(int(counted), len(os.sched_getaffinity(0)))
    return max(1, cpus // max(here, math.ceil(processes / max(1, training))))


def one_a_node(machines: Sequence[Resources]) -> float:
    """CPUs that a worker reserves so that each node, if all are alike, has room for one and for a task of Ray Data.

    Raises:
        UserError: no node, or one with less than 2 CPUs.
    """
    least = min(filter(None, (machine.get("CPU", 0) for machine in machines)), default=0)
    if least < 2:
        raise UserError(f"a range of --workers needs nodes of 2 CPUs or more, and one has {least:g}: give one number")
    return least / 2 + 0.5


def cluster_machines() -> list[Resources]:
    """What each node of the cluster has: of those that are up, or, told on the head of one that grows when asked, of
    as many as may come, the largest first.
    """
    import ray
    import yaml

    grows = Path.home() / GROWS_AS
    if os.environ.get("RAY_ADDRESS", "local") == "local" or not grows.is_file():
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = yaml.safe_load(grows.read_text())
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    may_come = [kind["resources"] for kind in kinds.values() for _ in range(kind.get("max_workers", 0))]
    may_come.sort(key=lambda machine: (machine.get("GPU", 0), machine.get("CPU", 0)), reverse=True)
    return [head["resources"], *may_come[: config["max_workers"]]]


def capacity(machines: Sequence[Resources]) -> tuple[float, float]:
    """CPUs and GPUs of them all."""
    cpus, gpus = (sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
    return cpus, gpus


def train_on_ray(
    config: Config,
    out: AnyPath,
    workers: int | tuple[int, int],
    cpus: float | None = None,
    callbacks: "list[UserCallback] | None" = None,
    runs: int = 1,
) -> dict[str, float]:
    """Trains on Ray Train workers, spread over the nodes; after a death those that are left, and those that replace
    the dead, go on from the newest checkpoint.

    Checkpoints go straight to ``out``, which all nodes must see, in the form that ``--in-process`` writes too.

    Args:
        workers: their number; or the least and the most, of which as many run as there are cards, or nodes where there
            are none, at the time.
        cpus: of each worker; None: as if the cluster were this run's alone.
        callbacks: Ray Train's, which hear of every checkpoint.
        runs: that share the cluster, this one among them.

    Raises:
        UserError: what the loop refuses, named in one line.
        RunStopped: SIGTERM came, and a checkpoint was saved.
    """
    start_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from fr_core.nets.checkpoint_files import checkpoints

    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    machines = cluster_machines()
    all_cpus, gpus = capacity(machines)
    if 0 < gpus < least:
        raise UserError(f"{least} workers for {gpus:.0f} GPUs; use --workers {gpus:.0f}")
    use_gpu = gpus > 0
    if not use_gpu and all_cpus == 0:
        raise UserError("no node of this cluster has a CPU or a GPU to give: start workers")
    if cpus is None:
        whole = least == most or use_gpu
        cpus = worker_cpus(machines, most) if whole else one_a_node(machines)
    for old in [*find_paths(out, MISTAKES), *find_paths(out, STOP_REQUEST)]:
        old.unlink()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "out": str(out.resolve()), "runs": runs},
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # mypy sees the class before 2.50
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
            placement_strategy="SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_EVERY,  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=out.key if isinstance(out, RemotePath) else str(out.resolve()),
            storage_filesystem=out.filesystem if isinstance(out, RemotePath) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=callbacks,  # type: ignore[arg-type]  # as num_workers
        ),
    )
    with on_signal(signal.SIGTERM, partial(write_text_atomically, out / STOP_REQUEST, "")):
        while True:
            before = checkpoints(out)[-1:]
            try:
                result: Any = trainer.fit()  # mypy sees the class before 2.50
                break
            except SystemExit:  # what Ray Train makes of Ctrl-C
                raise KeyboardInterrupt from None
            except TrainingFailedError as error:
                if told := _told(out) or _said_by(error):
                    raise told from None
                if checkpoints(out)[-1:] == before:
                    raise
                log.warning("%d lives ended; there are new checkpoints: going on", MAX_FAILURES + 1)
    told = _told(out)
    if told:
        raise told
    if isinstance(result.return_value, int):
        (out / STOP_REQUEST).unlink(missing_ok=True)
        raise RunStopped(result.return_value)
    return result.return_value


def train_worker(launch: dict[str, Any]) -> Any:
    """What each Ray Train worker runs. Rank 0's return value is the run's figures, or the step at which it left."""
    import ray.train

    from fr_core.data.stream import blocks_by_ray
    from fr_core.device import use_processor
    from fr_core.ranks import Ranks
    from fr_core.train.loop import train_loop

    out, ranks = to_path(launch["out"]), Ranks.current()
    if find_paths(out, MISTAKES):  # of an earlier life: a restart would only repeat it
        return {}
    context = ray.train.get_context()
    start_logging("json", run=out.name, rank=ranks.rank)
    log.info("worker started", extra={"facts": {"ranks": ranks.size}})
    use_processor(threads_of_each(launch["runs"] * ranks.size, context.get_local_world_size()))
    try:
        config = parse_config(launch["config"], "launch")
        report = partial(report_to_ray, Gauges(out.name, ranks.rank))
        return train_loop(config, out, ranks, blocks_by_ray, report, notices(out, ranks.rank, ranks.size))
    except RunStopped as left:
        return left.step
    except StorageError:  # may have passed when the workers are started again
        raise
    except UserError as error:
        log.error(str(error))
        with suppress(OSError, StorageError):  # the error itself says the same, after more lives
            write_text_atomically(out / MISTAKES.replace("*", str(ranks.rank)), str(error))
        raise


def notices(out: AnyPath, rank: int, size: int) -> Callable[[], Notice]:
    """What tells a rank once that Ray drains a worker's node, and rank 0 that the driver asked the run to leave."""
    import ray.train

    looked, known = 0.0, set[str]()

    def notice() -> Notice:
        nonlocal looked
        soon = time.monotonic() - looked < LOOK_EVERY
        if size == 1 and soon:  # a lone rank is asked at every step
            return Notice.NONE
        drained = ray.train.get_preemption_info()  # all ranks ask at the same steps: it is a collective
        new = set(drained.preempted_node_ids if drained else ()) - known
        known.update(new)
        if rank == 0 and not soon:
            looked = time.monotonic()
            if (out / STOP_REQUEST).is_file():
                return Notice.STOP
        return Notice.SAVE if new else Notice.NONE

    return notice


def report_to_ray(gauges: Gauges, metrics: dict[str, float], saved: AnyPath | None) -> None:
    """Tells Ray's metrics and the log, and Ray Train of checkpoints alone: a report costs two seconds."""
    import ray.train

    gauges.set(metrics)
    log_event(metrics, saved)
    if saved is not None:
        ray.train.report(metrics)


def _told(out: AnyPath) -> UserError | None:
    """The user's mistake that ended the workers, if that is what did."""
    messages = {path: path.read_text() for path in find_paths(out, MISTAKES)}
    for path in messages:
        path.unlink()
    return UserError(next(iter(messages.values()))) if messages else None


def _said_by(error: Exception) -> UserError | None:
    """The user's mistake among the failures of the workers' last lives."""
    causes = (getattr(failure, "cause", failure) for failure in getattr(error, "worker_failures", {}).values())
    return next((UserError(str(cause).splitlines()[0]) for cause in causes if isinstance(cause, UserError)), None)
