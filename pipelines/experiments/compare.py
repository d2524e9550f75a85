"""``bigface compare``: trains several settings with the same data, net and seeds; each finished run is a line of a CSV.

A comparison resumes where it was stopped, since a run with a line is not repeated. ``--minutes`` stops it between runs.
"""

import csv
import os
import re
import shlex
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path

from fr_core.config import Config
from fr_core.config.mends import as_toml
from fr_core.config.methods import DCQ, F2C, AttFC, BaseMethod, BigFace, Margin, VirtualFC
from fr_core.config.recipes import load_config
from fr_core.errors import UserError
from fr_core.nets.open import open_net
from fr_core.train.check import checked_plan
from fr_core.train.mlflow_runs import Comparison
from fr_core.verify.pairs import read_pairs
from fr_core.verify.report import markdown
from fr_core.verify.suites import find_sets, verify_suite
from pipelines.train import train

COLUMNS = (
    *("setting", "seed", "accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "seconds", "epochs", "loss"),
    *("images_per_second", "peak_memory_mib", "classes_mib"),
)
FACTS = ("images", "identities", "overrides", "commit")


def schedules(epochs: int, fast_epochs: int, fastface: list[str]) -> dict[str, list[str]]:
    """Return the overrides of each setting that FastFace (docs/methods/fastface.md) is compared with, by name.

    These are the recipe in full, cosine in fewer epochs, and FastFace in as few. All warm up as long as the recipe.

    Args:
        epochs: epochs of the recipe in full.
        fast_epochs: epochs of cosine and of FastFace.
        fastface: ``name=value`` of FastFace's schedule section.
    """
    fewer = f"train.epochs={fast_epochs}"
    return {
        "full": [f"train.epochs={epochs}"],
        "cosine": [fewer, "schedule.kind=cosine"],
        "fastface": [fewer, "schedule.kind=fastface", *(f"schedule.{setting}" for setting in fastface)],
    }


def heads(
    config: Config, steps: int, classes: int, flat: str, grouped: str, centres: int, scale: float, momentum: float
) -> dict[str, dict[str, list[str]]]:
    """Return the overrides of each setting in tables 1 to 5 of AttFC (arXiv 2025; docs/methods/attfc.md), by table.

    Every method keeps its published margin and its other defaults, and all share one scale. Virtual FC also trains on
    its class images, so it takes half the batch for as many steps, with a warm-up of as many steps.

    Args:
        config: config of the recipe; all settings share its batch and epochs.
        steps: steps of a run with this batch and these epochs.
        classes: classes of the dataset.
        flat: flat shards, for FC and Partial FC.
        grouped: grouped shards of the same faces, for the other methods.
        centres: class centres of every method in table 5.
        scale: scale s of every margin.
        momentum: momentum of every momentum encoder.

    Raises:
        UserError: the batch is odd, the centres are no multiple of the batch or more than the classes, or the class
            matrix has a teacher.
    """
    batch = config.train.global_batch
    if batch % 2 or centres % batch or centres > classes:
        raise UserError(
            f"--centres {centres} must be a multiple of train.global_batch = {batch}, an even number, and at most the "
            f"{classes} classes"
        )
    if config.method.taught:
        raise UserError("heads are compared without a teacher: take a recipe without method.distill")
    arc = Margin(scale=scale, m2=0.5, m3=0)

    def on(shards: str, method: BaseMethod) -> list[str]:
        return [f"data.path={shards}", f"method={as_toml(method.model_dump(exclude_none=True))}"]

    def attfc(ratio: float = 0.3, count: int = 2, strategy: str = "attention") -> list[str]:
        fields = {"margin": arc, "size_ratio": ratio, "class_images": count, "strategy": strategy}
        return on(grouped, AttFC.model_validate(fields | {"encoder_momentum": momentum}))

    virtual_fc = VirtualFC(margin=arc, anchors=centres)
    dcq = DCQ(margin=Margin(scale=scale, m2=0, m3=0.3), queue_size=centres, encoder_momentum=momentum)
    f2c = F2C(margin=Margin(scale=scale, m2=0, m3=0.4), pool_size=centres, encoder_momentum=momentum)
    virtual = [
        f"train.global_batch={batch // 2}",
        f"train.max_steps={steps}",
        f"schedule.warmup_epochs={config.schedule.warmup_epochs / 2}",
    ]
    return {
        "1, 2: size of the queue": {
            "FC": on(flat, BigFace(margin=arc)),
            **{f"AttFC r={ratio}": attfc(ratio) for ratio in (0.1, 0.2, 0.3)},
        },
        "3: class images": {f"AttFC K={count}": attfc(count=count) for count in (2, 3, 4, 5)},
        "4: strategies": {
            "AttFC single": attfc(strategy="single"),
            "AttFC constant": attfc(strategy="constant"),
            "AttFC attention": attfc(),
        },
        "5: equal centres": {
            f"PFC {centres}": on(flat, BigFace(margin=arc, sample_rate=centres / classes)),
            f"VFC {centres}": [*on(grouped, virtual_fc), *virtual],
            f"DCQ {centres}": on(grouped, dcq),
            f"F2C {centres}": on(grouped, f2c),
            f"AttFC {centres}": attfc(centres / classes),
        },
    }


# AttFC's published figure of each row (arXiv 2025): IJB-C TAR@FAR 1e-4; in table 5 the mean of four benchmarks.
PUBLISHED = {
    **{"FC": "96.18", "AttFC r=0.1": "95.20", "AttFC r=0.2": "95.43", "AttFC r=0.3": "95.78"},
    **{"AttFC K=2": "95.43", "AttFC K=3": "95.49", "AttFC K=4": "95.56", "AttFC K=5": "95.50"},
    **{"AttFC single": "94.93", "AttFC constant": "95.31", "AttFC attention": "95.78"},
    **{"PFC": "95.32", "VFC": "84.21", "DCQ": "93.86", "F2C": "93.80", "AttFC": "95.22"},
}


def named_settings(given: list[str]) -> dict[str, list[str]]:
    """Parse settings of the form ``NAME: key.path=value …``; values hold no spaces.

    Returns:
        The overrides of each setting, by name.

    Raises:
        UserError: there is no setting, one has no name, or two share a name.
    """
    settings: dict[str, list[str]] = {}
    for text in given:
        name, colon, overrides = text.partition(":")
        if not colon or not name.strip() or "=" in name:
            raise UserError(f"--setting {text!r}: write 'NAME: key.path=value …'")
        if name.strip() in settings:
            raise UserError(f"--setting {name.strip()} is given twice: use another name")
        settings[name.strip()] = overrides.split()
    if not settings:
        raise UserError("nothing to compare: give --setting 'NAME: key.path=value …', twice or more")
    return settings


def compare(
    recipe: str,
    settings: Mapping[str, list[str]],
    overrides: list[str],
    seeds: list[int],
    results: Path,
    workers: int,
    in_process: bool,
    minutes: float,
    say: Callable[[str], None],
    suite: Path | None = None,
) -> list[dict[str, str]]:
    """Train the runs that ``results`` lacks.

    Args:
        recipe: name or file of the recipe.
        settings: overrides of each setting, by name.
        overrides: overrides of all settings.
        seeds: seeds of each setting.
        results: CSV that finished runs are appended to.
        workers: Ray Train workers of each run.
        in_process: train without Ray.
        minutes: begin no run later than this.
        say: function that shows a line of progress.
        suite: folder of sets of pairs. Every run's accuracy on each set becomes a column, NAME_accuracy.

    Returns:
        The lines of ``results`` for these settings and seeds.

    Raises:
        UserError: there are no pairs to verify on, or the results file belongs to another comparison.
    """
    configs = {
        (name, seed): load_config(recipe, [*overrides, *extra, f"seed={seed}"])
        for seed in seeds
        for name, extra in settings.items()
    }
    if any(config.verify.pairs is None for config in configs.values()):
        raise UserError("no pairs to compare runs by: give verify.images=DIR verify.pairs=FILE")
    for config in configs.values():
        checked_plan(config, workers)
    for _, pairs_file in find_sets(suite).values() if suite else ():
        read_pairs(pairs_file)  # a damaged file should fail before the first run
    columns = (*COLUMNS, *(suite_columns(suite) if suite else ()), *FACTS)
    started, rows = time.monotonic(), read_results(results, columns)
    tracking = next(iter(configs.values())).tracking
    comparison = Comparison(tracking, results) if tracking.uri != "off" else None
    if comparison:
        child = tracking.model_copy(update={"parent": comparison.run_id, "uri": comparison.uri})
        configs = {key: config.model_copy(update={"tracking": child}) for key, config in configs.items()}
    done = {(row["setting"], int(row["seed"])): row for row in rows}
    finished: list[dict[str, str]] = []
    try:
        for (name, seed), config in configs.items():
            given = shlex.join([recipe, *overrides, *settings[name]])
            twins = [row for row in done.values() if (row["overrides"], row["seed"]) == (given, str(seed))]
            if (name, seed) in done:
                row = done[name, seed]
                if row["overrides"] != given:
                    raise UserError(
                        f"{results}: {name}, seed {seed} was run as {row['overrides']}: give another --results"
                    )
            elif twins:  # another setting has trained this very run
                row = twins[0] | {"setting": name}
                append_row(results, columns, row)
            else:
                if time.monotonic() - started > 60 * minutes:
                    say(f"{minutes:g} minutes are over; the same command continues with {name}, seed {seed}")
                    break
                say(f"{name}, seed {seed} …")
                out = results.with_suffix("") / run_name(name, seed)
                row = {"setting": name, "seed": str(seed)} | train_in_child(config, out, workers, in_process, suite)
                row |= {"overrides": given, "commit": commit()}
                append_row(results, columns, row)
                say(f"{name}, seed {seed}: accuracy {float(row['accuracy']):.4f} in {float(row['seconds']):.1f} s")
            done[name, seed] = row
            finished.append(row)
    finally:
        if comparison:
            comparison.close(markdown(summary(finished, tuple(SHOWN))))
    return finished


def run_name(setting: str, seed: int) -> str:
    """Return the name of a run's folder and of its MLflow run."""
    return re.sub(r"[^\w.=-]+", "-", f"{setting}-seed{seed}")


def suite_columns(suite: Path) -> list[str]:
    """Return the columns for the accuracy on each set of a suite."""
    return [f"{name}_accuracy" for name in find_sets(suite)]


def train_in_child(config: Config, out: Path, workers: int, in_process: bool, suite: Path | None) -> dict[str, str]:
    """Train in a child process, remove the run's folder, and return the run's figures as text.

    Each run has its own process because peak memory is a high-water mark. A figure is empty if the run lacks it, such
    as a TAR for which there are too few pairs.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
        figures = pool.submit(_figures, config, out, workers, in_process, suite).result()
    shutil.rmtree(out)
    with suppress(OSError):  # the folder may hold other runs
        out.parent.rmdir()
    wanted = (*COLUMNS[2:], *(suite_columns(suite) if suite else ()), "images", "identities")
    return {name: f"{figures[name]:.6g}" if name in figures else "" for name in wanted}


def _figures(config: Config, out: Path, workers: int, in_process: bool, suite: Path | None) -> dict[str, float]:
    figures = train(config, out, workers, in_process, overwrite=True)
    recogniser = open_net(out)
    results = verify_suite(recogniser.embed, suite, recogniser.net.input_size) if suite else {}
    return figures | {f"{name}_accuracy": result.verification.accuracy for name, result in results.items()}


def _end_with_parent() -> None:
    """Exit when the comparison's process ends, however it ends."""
    parent = parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


SHOWN = {  # column -> heading, factor, digits
    "accuracy": ("accuracy %", 100, 2),
    "tar_at_far_1e-2": ("TAR@FAR 1e-2", 1, 3),
    "tar_at_far_1e-3": ("TAR@FAR 1e-3", 1, 3),
    "seconds": ("seconds", 1, 0),
    "images_per_second": ("samples/s", 1, 0),
    "peak_memory_mib": ("peak memory, MiB", 1, 0),
    "classes_mib": ("classes, MiB", 1, 2),
}


def summary(rows: list[dict[str, str]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a table, header first: each setting's runs, and mean ± standard deviation over seeds of each column."""
    table: list[tuple[str, ...]] = [("setting", "runs", *(heading(column) for column in columns))]
    for name in dict.fromkeys(row["setting"] for row in rows):
        runs = [row for row in rows if row["setting"] == name]
        cells = []
        for column in columns:
            _, factor, digits = SHOWN.get(column, SHOWN["accuracy"])
            values = [factor * float(row[column]) for row in runs if row[column]]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        table.append((name, str(len(runs)), *cells))
    return table


def heading(column: str) -> str:
    """Return the heading of a column; columns of a suite's sets are named after the sets."""
    return SHOWN[column][0] if column in SHOWN else f"{column.removesuffix('_accuracy')} %"


def read_results(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the lines of a results file; a file that does not exist yet has none.

    Raises:
        UserError: the file has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise UserError(f"{path}: not a results file of this comparison: give another --results")
        return list(reader)


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, str]) -> None:
    """Append a line to a results file; a new file begins with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """Return the short commit of the source tree that runs, or "" outside of a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip()
