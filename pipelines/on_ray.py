"""The same loop on Ray: one local node by default, or the cluster that ``RAY_ADDRESS`` names."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from fr_core.config import Config, parse_config
from fr_core.data.store import AnyPath, RemotePath, find, to_path, write_text_atomically
from fr_core.errors import StorageError, UserError

START_ATTEMPTS = 3
MAX_FAILURES = 5  # lives that a run has after its first


def start_ray() -> None:
    """Joins the cluster of ``RAY_ADDRESS``, or starts a node of its own that ends with this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets any other process starve the training
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    dashboard = None if address != "local" else False
    for attempt in range(START_ATTEMPTS):
        if ray.is_initialized():
            return
        try:
            ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray has no class for it: a busy machine needs more than the 30 s that it waits
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise


def mapped(rows: list[dict[str, Any]], work: Any, **options: Any) -> Iterator[dict[str, Any]]:
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


def worker_cpus(cluster_cpus: float, workers: int) -> float:
    """CPUs that each worker reserves, so that at least half of the cluster's are left to Ray Data."""
    return min(1.0, cluster_cpus / (2 * workers))


def train_on_ray(config: Config, out: AnyPath, workers: int) -> dict[str, float]:
    """Trains on ``workers`` Ray Train workers; killed ones are replaced and go on from the newest checkpoint.

    Checkpoints go straight to ``out``, which all nodes must see, in the form that ``--in-process`` writes too.

    Raises:
        UserError: what the loop refuses, named in one line.
    """
    start_ray()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: dict[str, float] = ray.cluster_resources()
    gpus = resources.get("GPU", 0)
    if 0 < gpus < workers:
        raise UserError(f"{workers} workers for {gpus:.0f} GPUs; use --workers {gpus:.0f}")
    use_gpu = gpus > 0
    for old in find(out, "mistake_*"):
        old.unlink()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "out": str(out.resolve())},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": worker_cpus(resources["CPU"], workers), **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=out.key if isinstance(out, RemotePath) else str(out.resolve()),
            storage_filesystem=out.filesystem if isinstance(out, RemotePath) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _told(out) or error from None
    told = _told(out)
    if told:
        raise told
    return result.return_value


def train_worker(launch: dict[str, Any]) -> Any:
    """What each Ray Train worker runs. Rank 0's return value is the run's figures."""
    import ray.train

    from fr_core.data.stream import blocks_by_ray
    from fr_core.device import use_processor
    from fr_core.ranks import Ranks
    from fr_core.train.loop import train_loop

    out, ranks = to_path(launch["out"]), Ranks.current()
    if find(out, "mistake_*.txt"):  # of an earlier life: a restart would only repeat it
        return {}
    context = ray.train.get_context()
    use_processor((os.cpu_count() or 1) // context.get_local_world_size())
    try:
        config = parse_config(launch["config"], "launch")
        return train_loop(config, out, ranks, blocks_by_ray, ray.train.report)
    except StorageError:  # may have passed when the workers are started again
        raise
    except UserError as error:
        write_text_atomically(out / f"mistake_{ranks.rank}.txt", str(error))
        raise


def _told(out: AnyPath) -> UserError | None:
    """The user's mistake that ended the workers, if that is what did."""
    messages = {path: path.read_text() for path in find(out, "mistake_*.txt")}
    for path in messages:
        path.unlink()
    return UserError(next(iter(messages.values()))) if messages else None
