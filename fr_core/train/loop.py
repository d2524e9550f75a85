"""The train loop. It knows nothing of Ray: the caller passes in the ranks, the data blocks and a report function."""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from fr_core.config import Config, unlabelled_batch
from fr_core.config.nets import QuantisedNet
from fr_core.config.sections import Augment, Masks
from fr_core.data.plan import Plan
from fr_core.data.store import AnyPath, explain_disk_errors, find_paths, remove_folder
from fr_core.data.stream import Batch, batches, step_by_step, unlabelled
from fr_core.data.transfer import on_card
from fr_core.device import default_device, peak_memory
from fr_core.errors import RunStopped, UserError
from fr_core.nets.checkpoint_files import CHECKPOINTS, checkpoints, step_name
from fr_core.nets.open import Recogniser
from fr_core.nets.verifications import VERIFICATIONS
from fr_core.ranks import Ranks
from fr_core.train.check import check_pairs, fitting_plan, open_training_data
from fr_core.train.initial import initial_state, parameter_figures
from fr_core.train.methods import step
from fr_core.train.notice import Notice
from fr_core.train.outbox import UNDELIVERED
from fr_core.train.resume import resume
from fr_core.train.save import Saver, raise_together
from fr_core.train.state import TrainState
from fr_core.train.statistics import IMAGES, average_statistics, measure_last_norm
from fr_core.train.tracking import Tracker
from fr_core.train.update import metrics_of
from fr_core.train.warm_start import calibrate, copy_rows_by_name, load_backbone, set_prototypes, settle_norms
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import read_images, verify_embeddings
from fr_core.verify.report import make_report, roc_figure, score_figure, verification_figures, write_report

Blocks = Callable[[Plan, Ranks, int, int], Iterator[pa.Table]]
Report = Callable[[dict[str, float], AnyPath | None], None]


def train_loop(
    config: Config,
    out: AnyPath,
    ranks: Ranks,
    blocks: Blocks,
    report: Report,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
) -> dict[str, float]:
    """Train a run to its end, from its newest checkpoint if it has one.

    Each step takes one global batch and updates the weights. After a step, the loop logs, verifies or saves if that is
    due. All ranks run this function side by side.

    Args:
        out: folder of the run, local or at a URL; the same on all ranks.
        blocks: source of the rows (``fr_core/data/stream.py``).
        report: receives the metrics of a step, on every rank. The second argument is None when a step is logged, and
            the folder of the checkpoint after one was saved.
        notice: returns requests to this rank since the last call, at once: it is called in every step. A request to any
            rank holds for all ranks, which follow it after the same step; on a card, after the next one.

    Returns:
        The figures of the run's report.

    Raises:
        UserError: bad data, a checkpoint of another run, a full disk, or a loss that stays non-finite.
        RunStopped: a request stopped the run, after a checkpoint was saved.
    """
    state = resume_or_init(config, out, ranks, blocks)
    first_step = state.step
    tracker = open_tracker(config, out, state, ranks)
    stream = remaining_batches(config, state, ranks, blocks)
    saver = Saver(config, out, ranks)
    clock = Clock(config.train.global_batch + unlabelled_batch(config))
    try:
        while state.step < state.total_steps:
            batch = clock.next_batch(stream)
            state.asked = max(notice(), saver.notice())
            reading = step(config, state, batch, ranks)
            stop_if_diverged(config, state, saver)
            if tracker:
                tracker.step_done(batch)
            metrics = {"step": state.step, "epoch": epoch_of(state)}
            if is_due(config.train.log_every, state):
                metrics |= metrics_of(state, reading) | clock.rates(state.step)
                if tracker:
                    tracker.log(state.step, metrics)
            last = state.step == state.total_steps
            if last or is_due(config.train.verify_every, state):
                refresh_norm_statistics(config, state, ranks, blocks)
            if is_due(config.train.verify_every, state) and not last:
                metrics |= verify(config, state, ranks, tracker)
            if is_due(config.train.log_every, state):
                health = tracker.health() if tracker else {}
                report(metrics | {"head_mib": head_mib(state)} | health, None)
            request, state.notice = state.notice, Notice.NONE
            if request or (is_due(config.train.save_every, state) and reading.good):
                save(state, saver, tracker, partial(report, metrics | metrics_of(state, reading)))
            if request is Notice.STOP:
                saver.wait()
                raise RunStopped(state.step)
        return finish(config, state, ranks, saver, tracker, first_step)
    except BaseException as error:
        if tracker:
            with contextlib.suppress(Exception):  # report the first error, not one of the clean-up
                tracker.log_curves()
            with contextlib.suppress(Exception):
                tracker.close("KILLED" if isinstance(error, RunStopped) else "FAILED")
        raise
    finally:
        saver.close()
        stream.close()


def resume_or_init(config: Config, out: AnyPath, ranks: Ranks, blocks: Blocks) -> TrainState:
    """Return the state of the run's newest whole checkpoint, or a new one: seeded or warm-started."""
    plan = fitting_plan(config, open_training_data(config), ranks.size)
    with raise_together(ranks):
        if ranks.rank == 0:
            check_pairs(config)
    state = initial_state(config, plan, ranks, default_device())
    if not resume(config, state, out, ranks):
        load_backbone(config, state, ranks)
        plain = partial(plain_batches, config, plan, ranks, blocks)
        settle_norms(config, state, plain, ranks)
        if isinstance(config.net, QuantisedNet):
            steps = min(config.net.calibration_batches, state.total_steps or plan.steps_per_epoch)
            calibrate(config, state, partial(plain, steps), ranks)
        if config.init.head != "random":
            set_prototypes(config, state, plain(plan.steps_per_epoch), ranks)
        if config.init.head == "names":
            copy_rows_by_name(config, state)
    return state


def plain_batches(config: Config, plan: Plan, ranks: Ranks, blocks: Blocks, steps: int) -> Generator[Batch, None, None]:
    """Read this rank's first batches, without augmentation."""
    plain = {"augment": Augment(flip=0), "masks": Masks(), "progressive": None, "views": 1}
    data = config.data.model_copy(update=plain)
    return batches(config.model_copy(update={"data": data}), plan, ranks, 0, steps, blocks)


def remaining_batches(config: Config, state: TrainState, ranks: Ranks, blocks: Blocks) -> Generator[Batch, None, None]:
    """Read this rank's batches from the state's step on, with unlabelled images if the run takes them.

    Their images lie on the run's device.
    """
    steps = (state.step, state.total_steps)
    stream, other = batches(config, state.plan, ranks, *steps, blocks), unlabelled(config)
    if other is not None:
        stream = step_by_step(stream, batches(*other, ranks, *steps, blocks))
    return on_card(stream, state.device)


def open_tracker(config: Config, out: AnyPath, state: TrainState, ranks: Ranks) -> Tracker | None:
    """Open the tracker, on rank 0 alone, and give all ranks the id of its MLflow run."""
    tracker = Tracker(config, out, state.step, state.run_id) if ranks.rank == 0 else None
    if tracker:
        tracker.log_data(state.plan.dataset)
    state.run_id = ranks.broadcast_object(tracker and tracker.run_id)
    return tracker


def is_due(every: int | None, state: TrainState) -> bool:
    """Tell whether something that happens every so many steps happens now; None: never."""
    return every is not None and state.step % every == 0


def save(
    state: TrainState, saver: Saver, tracker: Tracker | None, then: Callable[[AnyPath], None] = lambda _: None
) -> None:
    """Save a checkpoint beside the training. Deliver the figures first, so that a resumed run has them all.

    Args:
        then: what each rank does when the checkpoint is whole; it gets the checkpoint's folder.
    """
    if tracker:
        tracker.flush()
    saver.save(state, tracker.wait if tracker else lambda: None, then)


def epoch_of(state: TrainState) -> float:
    """Return the epochs trained so far."""
    return state.step / state.plan.steps_per_epoch


def head_mib(state: TrainState) -> float:
    """Return the memory of this rank's class matrix or class centres, in MiB."""
    classes = state.head.state_dict() if state.head else {}
    return sum(tensor.nbytes for tensor in classes.values()) / 2**20


def stop_if_diverged(config: Config, state: TrainState, saver: Saver) -> None:
    """End a run whose loss or gradients stay non-finite.

    Raises:
        UserError: they were not finite for ``train.max_bad_steps`` steps; it names the last good checkpoint.
    """
    if state.bad_steps >= config.train.max_bad_steps:
        saver.wait()
        saved = checkpoints(saver.out)
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise UserError(
            f"loss or gradients not finite for {state.bad_steps} steps up to step {state.step}: {good}; lower optim.lr"
        )


def refresh_norm_statistics(config: Config, state: TrainState, ranks: Ranks, blocks: Blocks) -> None:
    """Average batch-norm statistics over ranks; after virtual identities, re-measure the last norm on real faces."""
    average_statistics(state, ranks)
    last = [name for name, module in state.usable.named_modules() if module is state.usable.last_norm]
    if config.data.variants > 1 and any(map(state.has_moved, last)):
        faces = config.model_copy(update={"data": config.data.model_copy(update={"variants": 1})})
        steps = min(-(-IMAGES // config.train.global_batch), state.plan.steps_per_epoch)
        measure_last_norm(config, state, plain_batches(faces, state.plan, ranks, blocks, steps), ranks)


def verify(config: Config, state: TrainState, ranks: Ranks, tracker: Tracker | None) -> dict[str, float]:
    """Verify the usable net on the recipe's pairs, if it names any. Each rank embeds a share of the images."""
    if config.verify.pairs is None:
        return {}
    pairs = read_pairs(config.verify.pairs)
    lo, hi = ranks.split(len(pairs.paths))
    crops = read_images(config.verify.images, pairs, state.usable.input_size, range(lo, hi))
    share = Recogniser(state.usable.eval(), state.device).embed(crops.images)
    shares = ranks.gather_objects((share, crops.failed))
    embeddings = np.concatenate([s for s, _ in shares])
    missing = {path: reason for _, f in shares for path, reason in f.items()}
    result, scores, usable = verify_embeddings(embeddings, missing, pairs)
    figures = verification_figures(result)
    if missing:
        figures |= {"missing_images": len(missing), "skipped_pairs": len(pairs.same) - len(usable.same)}
    if tracker:
        tracker.log_charts(state.step, figures)
        tracker.log_picture("roc", roc_figure({"this net": (scores, usable.same)}))
        tracker.log_picture("scores", score_figure(scores, usable.same, result.threshold))
    return figures


def finish(
    config: Config, state: TrainState, ranks: Ranks, saver: Saver, tracker: Tracker | None, first_step: int
) -> dict[str, float]:
    """Save the last checkpoint, verify, write ``report.json`` and return its figures.

    If the run was already finished when this call of the loop began, return the figures of its report instead.

    Args:
        first_step: step at which this call of the loop began.
    """
    out = saver.out
    saver.wait()
    if state.step == first_step and (known := ranks.broadcast_object(read_report(out, state.step))):
        if tracker:
            tracker.log_report(state.step, known)
            tracker.close("FINISHED")
        return known
    seconds = time.monotonic() - state.began
    last = out / "checkpoints" / step_name(state.step)
    if not ranks.broadcast_object(last in checkpoints(out)):
        save(state, saver, tracker)
        saver.wait()
    if tracker:
        tracker.log_net(state.step)
    peak = peak_memory(state.device)
    verification = verify(config, state, ranks, tracker)
    manifest = state.plan.dataset.manifest
    figures = {
        "steps": state.step,
        "epochs": epoch_of(state),
        "identities": manifest.identities,
        "images": manifest.images,
        **parameter_figures(config, manifest.identities),
        "workers": ranks.size,
        "seconds": seconds,
        "peak_memory_mib": peak / 2**20,  # rank 0 in training: its GPU, or else its process
        "classes_mib": head_mib(state),  # rank 0
    }
    if state.dropped_steps:
        figures["dropped_steps"] = state.dropped_steps
    figures |= verification
    if tracker:
        rates = [row["images_per_second"] for row in tracker.rows[1:] if "images_per_second" in row]
        figures |= {"images_per_second": float(np.median(rates))} if rates else {}
        finite = [row["loss"] for row in tracker.rows if np.isfinite(row["loss"])]
        figures |= {"loss": finite[-1]} if finite else {}
        tracker.log_curves()
        facts = {"config": config.model_dump(mode="json"), "pictures": tracker.pictures()}
        content = make_report("train", figures, run=str(out), checkpoint=str(last), **facts)
        with explain_disk_errors(out / "report.json"):
            write_report(out / "report.json", content)
        tracker.log_file("report.json")
        tracker.log_report(state.step, figures)
        tracker.close("FINISHED")
    return figures


def read_report(out: AnyPath, step: int) -> dict[str, float] | None:
    """Read the figures of the run's report; None if there is no report of this step."""
    path = out / "report.json"
    figures = json.loads(path.read_text())["figures"] if path.is_file() else {}
    return figures if figures.get("steps") == step else None


class Clock:
    """Measures throughput, and the share of time spent waiting for data."""

    def __init__(self, images: int) -> None:
        self.images = images  # per step, over all ranks
        self.step: int | None = None
        self.since, self.waiting = time.monotonic(), 0.0

    def next_batch(self, stream: Iterator[Batch]) -> Batch:
        """Return the next batch, and count the time that it took as waiting."""
        before = time.monotonic()
        batch = next(stream)
        self.waiting += time.monotonic() - before
        return batch

    def rates(self, step: int) -> dict[str, float]:
        """Return throughput and waiting share since the last call. The first call has no throughput."""
        now = time.monotonic()
        steps = step - self.step if self.step is not None else 0
        seconds = now - self.since
        rates = {"data_wait": self.waiting / seconds}
        if steps:
            rates["images_per_second"] = steps * self.images / seconds
        self.step, self.since, self.waiting = step, now, 0.0
        return rates


def holds_run(out: AnyPath) -> bool:
    """Tell whether a run was started in this folder, or its checkpoints were copied here."""
    return (out / "run.json").is_file() or bool(find_paths(out, CHECKPOINTS))


def clear_run(out: AnyPath) -> None:
    """Remove the checkpoints and figures of an earlier run in this folder. Other files stay."""
    if not holds_run(out):
        return
    for name in ("checkpoints", "pictures", "events"):
        remove_folder(out / name)
    for name in ("metrics.csv", "run.json", "report.json", VERIFICATIONS, UNDELIVERED):
        (out / name).unlink(missing_ok=True)
