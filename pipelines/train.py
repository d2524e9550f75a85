"""Launches a training run in this process or on Ray, and shows its progress from the run's ``metrics.csv``."""

import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fr_core.config import Config, lane_count, lane_multiple, rate_scale, total_steps
from fr_core.data.listing import is_image
from fr_core.data.plan import MOST_STRANDS
from fr_core.data.schema import CHUNK_IMAGES, Dataset
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
from fr_core.nets.checkpoint_files import DamagedCheckpoint, checkpoints, find_checkpoint, read_summary
from fr_core.ranks import Ranks
from fr_core.train.check import checked_plan, trained_people
from fr_core.train.notice import Notice
from pipelines.events import EVENTS, beside
from pipelines.logs import log, log_event, start_logging
from pipelines.machines import WAIT, await_machines, scale_workers
from pipelines.on_ray import RAY_FOLDER
from pipelines.origin import origin_of, write_origin
from pipelines.signals import on_signal

POLL = 2.0  # seconds between looks at metrics.csv
SILENCE = 180.0  # seconds without a step before a warning
SHOWN = 6  # changed settings of a resumed run that are listed
DATA_SUFFIXES = {".parquet", ".rec"}
DROPPED_SHARE = 0.01  # of the steps; float16 drops a few while it looks for its loss scale
SAY_EVERY = 30.0  # seconds between progress events where no terminal shows the line


def train(
    config: Config,
    out: AnyPath,
    workers: int | tuple[int, int] = 1,
    in_process: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    recipe: str = "",
    wait: float = WAIT,
) -> dict[str, float]:
    """Train a recipe to its end.

    Args:
        out: folder of the run, local or at a URL, for checkpoints, metrics.csv, pictures and report.json.
        workers: number of Ray workers, or the least and the most.
        in_process: train with one rank and without Ray.
        resume: continue from the newest checkpoint in ``out``.
        overwrite: remove what an earlier run left in ``out``.
        recipe: name or file that the config was loaded from, for the run's MLflow page.
        wait: minutes to wait for the machines of the workers.

    Returns:
        The figures of the run's report.

    Raises:
        UserError: bad data or config, options that contradict, a used or unwritable folder, or a number of workers that
            does not fit.
        RunStopped: SIGTERM came, and a checkpoint was saved.
    """
    from fr_core.data.stream import blocks_in_process
    from fr_core.device import use_processor
    from fr_core.train.loop import clear_run, holds_run, train_loop
    from fr_core.train.resume import changed_settings

    if resume and overwrite:
        raise UserError("--resume continues the run and --overwrite removes it: leave out one of them")
    if in_process and workers != 1:
        raise UserError("--in-process runs one worker: leave out --workers or --in-process")
    refuse_job_folder(out)
    start_logging(run=out.name)
    config = trackable(with_absolute_paths(config), out)
    if resume:
        config = with_saved_lanes(config, out)
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    plan = checked_plan(config, *range(least, most + 1))
    if config.data.check_sha256:
        plan.dataset.check_sha256()
        if other := unlabelled(config):
            other[1].dataset.check_sha256()
    if resume and not holds_run(out):
        raise UserError(f"--resume: {out} holds no run: give the run's folder as --out")
    if holds_run(out) and not (resume or overwrite):
        raise UserError(f"{out} holds a run: --resume continues it, --overwrite replaces it")
    if not (resume or overwrite):
        refuse_data_folder(out)
    log_doubts(config, plan.dataset)
    if resume and (changes := changed_settings(config, out)):
        rest = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        log.info("resuming with other settings: %s%s", ", ".join(changes[:SHOWN]), rest)
    with explain_disk_errors(out):
        if overwrite:
            check_kept(config, out)
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{uuid.uuid4().hex}"
        write_text_atomically(probe, "")
        probe.unlink()
    if not in_process:
        scaling = scale_workers(workers)
        await_machines(scaling, wait)
    with explain_disk_errors(out):
        if overwrite:
            clear_run(out)
        write_origin(origin_of(recipe), out)
    total = total_steps(config, plan.steps_per_epoch)
    rate = f"{config.optim.lr * rate_scale(config):.4g}"
    facts = {"method": config.method.kind, "steps": total, "rate": rate, "workers": workers}
    log.info("training", extra={"facts": facts})
    with progress_line(out, total):
        if in_process:
            use_processor(torch.get_num_threads())  # OMP_NUM_THREADS, or all cores of this process
            leave = threading.Event()
            with on_signal(signal.SIGTERM, leave.set):

                def notice() -> Notice:
                    return Notice.STOP if leave.is_set() else Notice.NONE

                figures = train_loop(config, out, Ranks(), blocks_in_process, log_event, notice)
        else:
            from pipelines.on_ray import train_on_ray

            figures = train_on_ray(config, out, scaling)
    log_troubles(figures)
    return figures


def refuse_data_folder(out: AnyPath) -> None:
    """Refuse a folder that holds photos, shards or other folders as the folder of a new run.

    Other files may lie there, such as logs and pruned weights, and what a start that failed early left.

    Raises:
        UserError: the folder holds photos, shards or other folders.
    """
    if not isinstance(out, Path) or not out.is_dir():
        return
    visible = [path for path in sorted(out.iterdir()) if path.name[0] != "." and path.name not in (RAY_FOLDER, EVENTS)]
    others = [p.name for p in visible if p.is_dir() or is_image(p.name) or p.suffix in DATA_SUFFIXES]
    if others:
        raise UserError(f"{out} holds data or other folders, such as {others[0]}: give a new or empty folder as --out")


def log_doubts(config: Config, dataset: Dataset) -> None:
    """Warn before a training if people of the verification pairs are trained on, or if chunks have a poor size."""
    chunk, wanted = dataset.manifest.chunk_images, config.method.facts.class_images
    if wanted and chunk > max(MOST_STRANDS, wanted + 1):
        log.warning(
            "%s has chunks of %d images, which come in %d parts: the method's centres are of fewer people. "
            "`bigface merge %s --out NEW --chunk %d` cuts them",
            *(dataset.root, chunk, MOST_STRANDS, dataset.root, max(wanted + 1, CHUNK_IMAGES)),
        )
    if wanted >= chunk:
        log.warning(
            "method.class_images = %d, but the chunks of %s have at most %d images: class images repeat. Ingest the "
            "photos with --chunk %d or more",
            *(wanted, dataset.root, chunk, wanted + 1),
        )
    known, people = trained_people(config, dataset)
    if known:
        log.warning(
            "%d of the %d people in verify.pairs have names of people in data.path: if they are the same, the accuracy "
            "says nothing of new people; `bigface split` holds people out",
            known,
            people,
        )


def log_troubles(figures: Mapping[str, float]) -> None:
    """Warn after a training if many of its steps were dropped, or if images of its pairs are missing."""
    steps, dropped = figures["steps"], figures.get("dropped_steps", 0)
    if dropped > DROPPED_SHARE * steps:
        log.warning("%d of %d steps were dropped, their loss was not finite: lower optim.lr", dropped, steps)
    if missing := figures.get("missing_images"):
        log.warning(
            "missing or unreadable images of verify.pairs: %d, pairs left out: %d; match takes its threshold from the "
            "other %d pairs; `bigface verify` lists the images",
            missing,
            figures["skipped_pairs"],
            figures["pairs"],
        )


def trackable(config: Config, out: AnyPath) -> Config:
    """Return the config, without MLflow if its database would lie at a URL."""
    if not isinstance(out, RemotePath) or config.tracking.uri is not None:
        return config
    log.warning("MLflow is off: its database cannot lie at a URL; give tracking.uri=SERVER")
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "off"})})


def with_saved_lanes(config: Config, out: AnyPath) -> Config:
    """Return the config with the lanes of the run's newest checkpoint, unless the recipe states lanes.

    An earlier version may have had another default, and the order of samples depends on the lanes.
    """
    saved = checkpoints(out)[-1:]
    with suppress(DamagedCheckpoint):  # resuming falls back to an older one, and says so
        lanes = [read_summary(folder)["lanes"] for folder in saved if config.data.lanes is None]
        if lanes and lanes[0] != lane_count(config) and lane_multiple(config) % lanes[0] == 0:
            return config.model_copy(update={"data": config.data.model_copy(update={"lanes": lanes[0]})})
    return config


def check_kept(config: Config, out: AnyPath) -> None:
    """Check that overwriting ``out`` removes no weights that this run starts from or learns from.

    Raises:
        UserError: ``init.backbone`` or the teacher lies in ``out``.
    """
    method, folder = config.method.taught, str(out.resolve())
    for place in (config.init.backbone, method and method.teacher):
        if place == folder or (place and place.startswith(f"{folder}/checkpoints/")):
            raise UserError(f"{out} holds {place}, which this run needs: give another --out")


def with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute paths, since workers have other working directories.

    A teacher that is a run becomes its newest checkpoint, so that restarted workers learn from the same one.

    Raises:
        UserError: the teacher's run has no checkpoint.
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
    """Return when a run last wrote or touched its metrics.csv, in nanoseconds, or None if this is unknown.

    Only a local file tells: files at URLs are not touched between two rows.
    """
    path = out / "metrics.csv"
    return path.stat().st_mtime_ns if isinstance(path, Path) and path.is_file() else None


def written_report(out: AnyPath) -> str | None:
    """Return the text of a run's report.json, or None before the run has one."""
    path = out / "report.json"
    return path.read_text() if path.is_file() else None


def progress_text(row: Mapping[str, float]) -> str:
    """Return a metrics row in short: loss, learning rate and throughput. A first row has no throughput yet."""
    text = f"loss {row['loss']:.3f}  lr {row['lr']:.4g}"
    rate = row.get("images_per_second")
    return f"{text}  {rate:.{0 if rate >= 10 else 1}f} img/s" if rate else text


def progress_facts(row: Mapping[str, float], total: int) -> dict[str, float]:
    """Return the facts of a progress event; a first row has no throughput yet."""
    facts = {"step": row["step"], "of": total, "loss": row["loss"], "lr": row["lr"]}
    rate = row.get("images_per_second")
    return facts | {"img/s": rate} if rate else facts


@contextmanager
def progress_line(out: AnyPath, total: int) -> Iterator[None]:
    """Show a progress line that follows a run's metrics.csv until the block ends.

    Without a terminal, events in the log take its place. A warning says when no step is taken for long.
    """
    from fr_core.train.metrics import newest_metrics
    from fr_core.train.tracking import FLUSH_EVERY

    columns = (
        TextColumn("step {task.completed:.0f}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    poll = POLL if isinstance(out, Path) else FLUSH_EVERY
    before = None
    with suppress(StorageError):
        before = newest_metrics(out)  # the row of an earlier start is no news
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=total, text="")

        def follow(done: threading.Event) -> None:
            began = moved = time.monotonic()
            said, step, beat, patience = 0.0, before and before["step"], None, SILENCE
            while not done.wait(poll):
                row = None
                with suppress(StorageError):  # if storage stays away, the run itself fails
                    row = newest_metrics(out)
                if last_touched(out) != beat:  # the run touches the file also between two rows
                    if row is None and beat is not None and not said:
                        said = time.monotonic()
                        log.info("first step done", extra={"facts": {"of": total, "seconds": said - began}})
                    beat, moved = last_touched(out), time.monotonic()
                if row is None or row["step"] == step:
                    if time.monotonic() - moved > patience:
                        moved = time.monotonic()
                        log.warning(
                            "no step for %d s: a verification takes long, or workers wait for machines", patience
                        )
                    continue
                if isinstance(out, RemotePath) and step is not None:  # there, only rows show that the run is alive
                    patience = max(SILENCE, 3 * (time.monotonic() - moved))
                step, moved = row["step"], time.monotonic()
                progress.update(task, completed=row["step"], text=progress_text(row))
                if not console.is_terminal and time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    log.info("progress", extra={"facts": progress_facts(row, total)})

        with beside(follow):
            yield
