"""Launches a training run: here, or on Ray, with a progress line fed by the run's own ``metrics.csv``."""

import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fr_core.config import Config, total_steps
from fr_core.data.store import (
    AnyPath,
    RemotePath,
    explain_disk_errors,
    refuse_job_folder,
    to_path,
    write_text_atomically,
)
from fr_core.data.stream import unlabelled
from fr_core.errors import StorageError, UserError
from fr_core.nets.checkpoint_files import find_checkpoint
from fr_core.ranks import Ranks
from fr_core.train.check import checked_plan
from fr_core.train.notice import Notice
from pipelines.logs import log, log_event, start_logging
from pipelines.signals import on_signal

POLL = 2.0  # seconds
SILENCE = 180.0  # seconds without a step, after which a run says so


def train(
    config: Config,
    out: AnyPath,
    workers: int | tuple[int, int] = 1,
    in_process: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, float]:
    """Runs a recipe to its end.

    Args:
        out: the run's folder, local or at a URL: checkpoints, metrics.csv, pictures, report.json.
        workers: on Ray; their number, or the least and the most.
        in_process: without Ray, one rank.
        resume: go on from the newest checkpoint in ``out``.
        overwrite: drop what an earlier run left in ``out``.

    Raises:
        UserError: bad data or config, a used or unwritable folder, a number of workers that does not fit.
        RunStopped: SIGTERM came, and a checkpoint was saved.
    """
    from fr_core.data.stream import blocks_in_process
    from fr_core.device import use_processor
    from fr_core.train.loop import clear_run, holds_run, train_loop

    if in_process and workers != 1:
        raise UserError("--in-process runs one worker; leave --workers out, or leave --in-process out")
    refuse_job_folder(out)
    start_logging(run=out.name)
    config = trackable(with_absolute_paths(config), out)
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    plan = checked_plan(config, *range(least, most + 1))
    if config.data.check_sha256:
        plan.dataset.check_sha256()
        if other := unlabelled(config):
            other[1].dataset.check_sha256()
    if resume and not holds_run(out):
        raise UserError(f"--resume: {out} holds no run: name the run's folder")
    if holds_run(out) and not (resume or overwrite):
        raise UserError(f"{out} holds a run: --resume goes on with it, --overwrite replaces it")
    with explain_disk_errors(out):
        if overwrite:
            check_kept(config, out)
            clear_run(out)
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{uuid.uuid4().hex}"
        write_text_atomically(probe, "")
        probe.unlink()
    total = total_steps(config, plan.steps_per_epoch)
    log.info("training", extra={"facts": {"method": config.method.kind, "steps": total, "workers": workers}})
    with progress_line(out, total):
        if in_process:
            use_processor(torch.get_num_threads())  # OMP_NUM_THREADS, or the cores that this process may use
            leave = threading.Event()
            with on_signal(signal.SIGTERM, leave.set):

                def notice() -> Notice:
                    return Notice.STOP if leave.is_set() else Notice.NONE

                return train_loop(config, out, Ranks(), blocks_in_process, log_event, notice)
        from pipelines.on_ray import train_on_ray

        return train_on_ray(config, out, workers)


def trackable(config: Config, out: AnyPath) -> Config:
    """The config, without MLflow where its database would have to lie at a URL."""
    if not isinstance(out, RemotePath) or config.tracking.uri is not None:
        return config
    log.warning("without MLflow, whose database cannot lie at a URL; tracking.uri names a server")
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "off"})})


def check_kept(config: Config, out: AnyPath) -> None:
    """Raises: UserError: a run that is to be overwritten holds the weights that this one starts from or learns from."""
    method, folder = config.method.taught, str(out.resolve())
    for place in (config.init.backbone, method and method.teacher):
        if place == folder or (place and place.startswith(f"{folder}/checkpoints/")):
            raise UserError(f"{out} holds {place}, which this run needs: use another folder")


def with_absolute_paths(config: Config) -> Config:
    """The config as workers elsewhere can use it: their working directory is another.

    A teacher that is a run becomes its newest checkpoint, the same for all workers and all their lives.

    Raises:
        UserError: a teacher's run without a checkpoint.
    """
    tree = config.model_dump()
    method, distill = tree["method"], tree["method"].get("distill") or {}
    places = [(tree["data"], "path"), (tree["init"], "backbone"), (tree["verify"], "images"), (tree["verify"], "pairs")]
    places += [(method, "teacher"), (distill, "teacher"), (distill, "embeddings")]
    places += [(distill.get("unlabelled") or {}, name) for name in ("path", "embeddings")]
    for section, name in places:
        if section.get(name):
            section[name] = str(to_path(section[name]).resolve())
    for section in (method, distill):
        if section.get("teacher") and (run := to_path(section["teacher"])).is_dir():
            section["teacher"] = str(find_checkpoint(run))
    scheme, _, database = (tree["tracking"]["uri"] or "").partition("sqlite:///")
    if database and not scheme:
        tree["tracking"]["uri"] = f"sqlite:///{Path(database).resolve()}"
    return Config.model_validate(tree)


def last_touched(out: AnyPath) -> int | None:
    """When a run on a local disk last wrote or touched its metrics.csv, in nanoseconds; None: it cannot be told."""
    path = out / "metrics.csv"
    return path.stat().st_mtime_ns if isinstance(path, Path) and path.is_file() else None


@contextmanager
def progress_line(out: AnyPath, total: int) -> Iterator[None]:
    """A Rich progress line that follows a run's metrics.csv until the block ends."""
    from fr_core.train.metrics import newest_metrics
    from fr_core.train.tracking import FLUSH_EVERY

    columns = (
        TextColumn("step {task.completed:.0f}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  lr {task.fields[lr]:.4g}  {task.fields[rate]:.0f} img/s"),
        TimeRemainingColumn(),
    )
    poll = POLL if isinstance(out, Path) else FLUSH_EVERY
    done = threading.Event()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=total, loss=float("nan"), lr=0.0, rate=0.0)

        def follow() -> None:
            said, step, beat, moved, patience = 0.0, None, None, time.monotonic(), SILENCE
            while not done.wait(poll):
                row = None
                with suppress(StorageError):  # the run itself will tell
                    row = newest_metrics(out)
                if last_touched(out) != beat:  # steps are taken, also between two rows of metrics.csv
                    beat, moved = last_touched(out), time.monotonic()
                if row is None or row["step"] == step:
                    if time.monotonic() - moved > patience:
                        moved = time.monotonic()
                        log.warning("no step for %d s: a long verification, or workers wait for machines", patience)
                    continue
                if isinstance(out, RemotePath) and step is not None:  # where rows alone tell
                    patience = max(SILENCE, 3 * (time.monotonic() - moved))
                step, moved = row["step"], time.monotonic()
                loss, rate = row["loss"], row.get("images_per_second", 0.0)
                progress.update(task, completed=row["step"], loss=loss, lr=row["lr"], rate=rate)
                if not console.is_terminal and time.monotonic() - said > 30:
                    said = time.monotonic()
                    log.info(
                        "trained", extra={"facts": {"step": row["step"], "of": total, "loss": loss, "img/s": rate}}
                    )

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
