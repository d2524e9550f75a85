"""Runs work on the Ray node or cluster that :func:`~pipelines.ray_start.start_ray` starts or joins: training, rows."""

import logging
import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fr_core.config import Config
from fr_core.config.recipes import parse_config
from fr_core.data.store import AnyPath, RemotePath, find_paths, to_path, write_text_atomically
from fr_core.errors import RunStopped, StorageError, UserError
from fr_core.train.notice import Notice
from pipelines.events import beside
from pipelines.gauges import Gauges
from pipelines.logs import log, log_event
from pipelines.ray_start import start_ray
from pipelines.signals import hearing_ctrl_c, on_signal

if TYPE_CHECKING:
    from ray.train import ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

MAX_FAILURES = 5  # restarts of the workers, after which a failure ends the run unless it has a new checkpoint
STOP_REQUEST = ".leave"  # file in the run's folder: the driver was asked to stop
MISTAKES = ".mistake_*.txt"  # files in the run's folder: user errors that workers met
RAY_FOLDER = "ray"  # folder in the run's folder for the files of Ray Train
LOOK_EVERY = 2.0  # seconds between looks for notices
CARDS = "cpu:gloo,cuda:nccl"  # what the hosts tell each other does not pass through the cards, and waits for none

Row = dict[str, Any]  # of Ray Data


def map_rows(rows: list[Row], work: Callable[..., Any], **options: Any) -> Iterator[Row]:
    """Map rows by Ray Data and yield the results in any order.

    Args:
        work: a function, or the class of an actor.
        options: options of Ray Data's ``map``, such as ``num_cpus``.

    Raises:
        UserError: ``work`` raised it; the message is one line.
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
            raise UserError(str(error.cause).splitlines()[0]) from None  # Ray appends a traceback
        raise


def worker_threads(processes: int, here: int = 1) -> int:
    """Return the threads of each training process, so that the processes of a node share its CPUs.

    Ray counts a node's CPUs; in a container these are the container's share of the machine. Processes with cards fill a
    node before they take another, so a node with cards may hold as many as it has cards.

    Args:
        processes: training processes on the whole cluster.
        here: training processes that are known to be on this node.
    """
    import ray

    this_node = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    own = next(node["Resources"] for node in nodes if node["NodeID"] == this_node)
    cpus = min(int(own.get("CPU", 0)), len(os.sched_getaffinity(0)))
    training_nodes = sum(node["Resources"].get("CPU", 0) > 0 for node in nodes)
    evenly = math.ceil(processes / max(1, training_nodes))
    processes_per_node = min(processes, int(own["GPU"])) if own.get("GPU") else evenly
    return max(1, cpus // max(here, processes_per_node))


def train_on_ray(
    config: Config,
    out: AnyPath,
    scaling: "ScalingConfig",
    callbacks: "list[UserCallback] | None" = None,
    runs: int = 1,
) -> dict[str, float]:
    """Train on Ray Train workers (:func:`~pipelines.machines.placement` says where).

    When a worker dies, the others and its replacement continue from the newest checkpoint. All nodes must see ``out``:
    workers write checkpoints straight into it, in the same form as ``--in-process``.

    Args:
        scaling: number of workers and what each reserves, of :func:`~pipelines.machines.scale_workers`.
        callbacks: callbacks of Ray Train, which hear of every checkpoint.
        runs: runs that share the cluster, this one included.

    Returns:
        The figures of the run's report.

    Raises:
        UserError: the train loop raised it; the message is one line.
        RunStopped: SIGTERM came, and a checkpoint was saved.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.events import workers_events, workers_failed

    for old in [*find_paths(out, MISTAKES), *find_paths(out, STOP_REQUEST)]:
        old.unlink()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "out": str(out.resolve()), "runs": runs},
        scaling_config=scaling,
        torch_config=TorchConfig(backend=CARDS if scaling.use_gpu else "gloo"),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=out.key if isinstance(out, RemotePath) else str(out.resolve()),
            storage_filesystem=out.filesystem if isinstance(out, RemotePath) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[workers_failed(out.resolve()), *(callbacks or [])],  # type: ignore[list-item]  # as num_workers
        ),
    )
    with workers_events(out), on_signal(signal.SIGTERM, partial(write_text_atomically, out / STOP_REQUEST, "")):
        figures = _fit(trainer, out)
    if mistake := _take_recorded_error(out):
        raise mistake
    if isinstance(figures, int):
        (out / STOP_REQUEST).unlink(missing_ok=True)
        raise RunStopped(figures)
    return figures


def _fit(trainer: "TorchTrainer", out: AnyPath) -> Any:
    """Let Ray Train run its workers, anew after too many failures if they left new checkpoints.

    Returns:
        What rank 0 returned.

    Raises:
        UserError: a worker raised it.
    """
    from ray.train import TrainingFailedError

    from fr_core.nets.checkpoint_files import checkpoints

    while True:
        before = checkpoints(out)[-1:]
        try:
            with hearing_ctrl_c():  # Ray Train asks all workers to end, and waits for them without limit
                result: Any = trainer.fit()  # mypy sees the class before 2.50
            return result.return_value
        except SystemExit:  # Ray Train turns Ctrl-C into this
            raise KeyboardInterrupt from None
        except TrainingFailedError as error:
            if mistake := _take_recorded_error(out) or _first_user_error(error):
                raise mistake from None
            if checkpoints(out)[-1:] == before:
                raise
            log.warning("workers failed %d times; there are new checkpoints: the run continues", MAX_FAILURES + 1)


def train_worker(launch: dict[str, Any]) -> Any:
    """Train as one rank; every Ray Train worker runs this.

    Returns:
        The figures of the run, or the step at which it was stopped. Ray Train hands on those of rank 0.
    """
    import ray.train

    from fr_core.data.stream import blocks_by_ray
    from fr_core.device import use_processor
    from fr_core.ranks import Ranks
    from fr_core.train.loop import train_loop
    from pipelines.events import log_as_worker

    out, ranks = to_path(launch["out"]), Ranks.current()
    if find_paths(out, MISTAKES):  # a user error ended the workers before; a restart would repeat it
        return {}
    log_as_worker(out, ranks.rank, ranks.size)
    use_processor(worker_threads(launch["runs"] * ranks.size, ray.train.get_context().get_local_world_size()))
    try:
        config = parse_config(launch["config"], "launch")
        report = partial(report_to_ray, Gauges(out.name, ranks.rank))
        if ranks.rank:
            return train_loop(config, out, ranks, blocks_by_ray, report)
        with notices(out) as notice:
            return train_loop(config, out, ranks, blocks_by_ray, report, notice)
    except RunStopped as stopped:
        return stopped.step
    except StorageError:  # storage may answer again once the workers have restarted
        raise
    except UserError as error:
        with suppress(OSError, StorageError):  # without the file, the command reads the error after all restarts
            write_text_atomically(out / MISTAKES.replace("*", str(ranks.rank)), str(error))
        raise


@contextmanager
def notices(out: AnyPath, every: float = LOOK_EVERY) -> Iterator[Callable[[], Notice]]:
    """Watch for notices to a run in a thread; yield a function that returns the strongest since its last call.

    A notice says SAVE once for each worker's node that Ray drains, and STOP once the driver was asked to stop.
    """
    found: queue.SimpleQueue[Notice] = queue.SimpleQueue()

    def look(done: threading.Event) -> None:
        known: set[str] = set()
        stopping = False
        while not done.wait(every):
            if new := drained_nodes() - known:
                known |= new
                log.warning("nodes drained: saving a checkpoint", extra={"facts": {"nodes": sorted(new)}})
                found.put(Notice.SAVE)
            with suppress(StorageError):  # the next look may find storage again
                if not stopping and (out / STOP_REQUEST).is_file():
                    stopping = True
                    found.put(Notice.STOP)

    def notice() -> Notice:
        return max([Notice.NONE, *(found.get() for _ in range(found.qsize()))])

    with beside(look):
        yield notice


def drained_nodes() -> set[str]:
    """Return the ids of workers' nodes that Ray drains. Ray has sent them to this worker already, so this asks nobody.

    ``ray.train.get_preemption_info`` is a collective of all workers, and took 173 ms with 64 of them.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    told = get_train_context().preemption_context.preemption_info
    return set(told.preempted_node_ids) if told else set()


def report_to_ray(gauges: Gauges, metrics: dict[str, float], saved: AnyPath | None) -> None:
    """Report to Ray's metrics and the log, and to Ray Train after checkpoints only: its report takes two seconds."""
    import ray.train

    gauges.set(metrics)
    log_event(metrics, saved)
    if saved is not None:
        ray.train.report(metrics)


def _take_recorded_error(out: AnyPath) -> UserError | None:
    """Return the user error that a worker left in the run's folder, if any, and remove the files."""
    messages = {path: path.read_text() for path in find_paths(out, MISTAKES)}
    for path in messages:
        path.unlink()
    return UserError(next(iter(messages.values()))) if messages else None


def _first_user_error(error: Exception) -> UserError | None:
    """Return the first user error among the workers' failures, if there is one."""
    causes = (getattr(failure, "cause", failure) for failure in getattr(error, "worker_failures", {}).values())
    return next((UserError(str(cause).splitlines()[0]) for cause in causes if isinstance(cause, UserError)), None)
