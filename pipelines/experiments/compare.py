"""``bigface compare``: trains several settings with the same data, net and seeds; each finished run is a line of a CSV.

A comparison resumes where it was stopped, since a run with a line is not repeated. ``--minutes`` stops it between runs.

With folds, the people of the training set are cut into as many parts. A setting trains on all parts but one and is
verified on that one, for each part in turn. So settings are chosen without a look at the pairs that are reported.
"""

import csv
import os
import re
import shlex
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

from fr_core.config import Config
from fr_core.errors import UserError
from fr_core.nets.open import open_net
from fr_core.nets.start import load_started
from fr_core.train.check import checked_plan, open_training_data
from fr_core.train.mlflow_runs import Comparison
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.suites import find_sets, verify_suite
from pipelines.datasets.split import Fold, folds_of, refuse_pairs
from pipelines.experiments.paired import mean_interval, paired_differences
from pipelines.origin import commit, origin_of
from pipelines.train import train

COLUMNS = (
    *("setting", "seed", "accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "seconds", "epochs", "loss"),
    *("images_per_second", "peak_memory_mib", "classes_mib"),
)
FACTS = ("images", "identities", "overrides", "commit")


@dataclass(frozen=True)
class Conditions:
    """What all settings of a comparison share beside the recipe."""

    results: Path
    """CSV that finished runs are appended to."""
    seeds: Sequence[int]
    """Seeds of each setting."""
    folds: int | None = None
    """Parts of the training people to verify on in turn. None: verify on the recipe's pairs."""
    workers: int = 1
    """Ray Train workers of each run."""
    in_process: bool = False
    """Train without Ray."""
    minutes: float = 40
    """Begin no run later than this."""
    suite: Path | None = None
    """Folder of sets of pairs. Every run's accuracy on each set becomes a column, NAME_accuracy."""
    against: str | None = None
    """Setting that the others are set against. None: the first."""

    @property
    def folder(self) -> Path:
        """Return the folder of the folds, which stays after the comparison."""
        return self.results.with_suffix("") / "folds"


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    setting: str
    seed: int
    fold: str  # number of the fold and of all folds, such as 0/3; "": no folds
    config: Config
    overrides: str  # recipe and overrides of the setting, as the results name them

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what names the run among those of its comparison."""
        return self.setting, str(self.seed), self.fold

    @property
    def name(self) -> str:
        """Return the name of the run's folder and of its MLflow run."""
        fold = f"-fold{self.fold}" if self.fold else ""
        return re.sub(r"[^\w.=-]+", "-", f"{self.setting}-seed{self.seed}{fold}")

    @property
    def title(self) -> str:
        """Return the run's name for people."""
        return f"{self.setting}, seed {self.seed}" + (f", fold {self.fold}" if self.fold else "")


def compare(
    recipe: str,
    settings: Mapping[str, list[str]],
    overrides: list[str],
    conditions: Conditions,
    say: Callable[[str], None],
) -> list[dict[str, str]]:
    """Train the runs that the results lack.

    Args:
        recipe: name or file of the recipe.
        settings: overrides of each setting, by name.
        overrides: overrides of all settings.
        say: function that shows a line of progress.

    Returns:
        The lines of the results for these settings and seeds.

    Raises:
        UserError: no setting has the name of ``conditions.against``. There are no pairs to verify on, or too few people
            for the folds. Or the results file has no ending, or belongs to another comparison or to other data.
    """
    results, suite, baseline = conditions.results, conditions.suite, conditions.against or next(iter(settings))
    if not results.suffix:
        raise UserError(f"--results {results}: the runs' folder has this name: use {results}.csv")
    if baseline not in settings:
        raise UserError(f"--against {baseline}: no such setting: use one of {', '.join(settings)}")
    columns = (*COLUMNS[:2], *(["fold"] if conditions.folds else []), *COLUMNS[2:])
    columns = (*columns, *(suite_columns(suite) if suite else ()), *FACTS)
    started, rows = time.monotonic(), read_results(results, columns)
    runs = list_runs(recipe, settings, overrides, conditions)
    for run in runs:
        manifest = checked_plan(run.config, conditions.workers).dataset.manifest
        if row := line_of(run, rows):
            refuse_other_run(results, run, row, (manifest.images, manifest.identities))
    for _, pairs_file in find_sets(suite).values() if suite else ():
        read_pairs(pairs_file)  # a damaged file should fail before the first run
    tracking = runs[0].config.tracking
    comparison = Comparison(tracking, results, origin_of(recipe)) if tracking.uri != "off" else None
    if comparison:
        child = tracking.model_copy(update={"parent": comparison.run_id, "uri": comparison.uri, "net": False})
        runs = [replace(run, config=run.config.model_copy(update={"tracking": child})) for run in runs]
    finished: list[dict[str, str]] = []
    try:
        for run in runs:
            row = line_of(run, rows)
            if row and row["setting"] != run.setting:  # another setting has trained this very run
                row = row | {"setting": run.setting}
                append_row(results, columns, row)
            elif row is None:
                if time.monotonic() - started > 60 * conditions.minutes:
                    say(f"{conditions.minutes:g} minutes are over; the same command continues with {run.title}")
                    break
                say(f"{run.title} …")
                out = results.with_suffix("") / run.name
                figures = train_in_child(run.config, out, conditions, recipe)
                row = dict(zip(("setting", "seed", "fold"), run.key, strict=True)) | figures
                row = {name: text for name, text in row.items() if name in columns}
                row |= {"overrides": run.overrides, "commit": commit()}
                append_row(results, columns, row)
                say(f"{run.title}: accuracy {float(row['accuracy']):.4f} in {float(row['seconds']):.1f} s")
            rows.append(row)
            finished.append(row)
    finally:
        if comparison:
            comparison.close(verdict(finished, baseline), summary(finished, tuple(SHOWN)))
    return finished


def line_of(run: Run, rows: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """Return a run's line of the results, or else that of another setting with the same overrides."""
    alike = [row for row in rows if (row["seed"], row.get("fold", "")) == run.key[1:]]
    own = [row for row in alike if row["setting"] == run.setting]
    return next(iter([*own, *(row for row in alike if row["overrides"] == run.overrides)]), None)


def refuse_other_run(results: Path, run: Run, row: Mapping[str, str], data: tuple[int, int]) -> None:
    """Refuse a line of the results that is of other overrides, or of another dataset in the same folder.

    Args:
        data: images and identities that the run would train on.

    Raises:
        UserError: it is.
    """
    if row["overrides"] != run.overrides:
        raise UserError(f"{results}: {run.title} was run as {row['overrides']}: give another --results")
    then, now = (row["images"], row["identities"]), tuple(f"{number:.6g}" for number in data)  # as the lines have them
    if all(then) and then != now:
        raise UserError(
            f"{results}: {run.title} was run on {then[0]} images of {then[1]} identities, and there are {now[0]} of "
            f"{now[1]} now: give another --results"
        )


def list_runs(
    recipe: str, settings: Mapping[str, list[str]], overrides: list[str], conditions: Conditions
) -> list[Run]:
    """Return the runs of a comparison, the settings in turn for each seed and fold.

    The folds of each dataset are cut once, and lie in the comparison's folder.

    Raises:
        UserError: there are no pairs to verify on, or folds and pairs, or too few people for the folds.
    """
    runs, cut, count = [], dict[str, list[Fold]](), conditions.folds
    for seed in conditions.seeds:
        for number in range(count or 1):
            for name, extra in settings.items():
                config = load_started(recipe, [*overrides, *extra, f"seed={seed}"])
                if count is None and config.verify.pairs is None:
                    raise UserError("no pairs to compare by: give verify.images=DIR verify.pairs=FILE, or --folds 3")
                if count:
                    refuse_pairs(config)
                    if config.data.path not in cut:
                        cut[config.data.path] = folds_of(open_training_data(config).root, conditions.folder, count)
                    config = cut[config.data.path][number].of(config)
                given = shlex.join([recipe, *overrides, *extra])
                runs.append(Run(name, seed, f"{number}/{count}" if count else "", config, given))
    return runs


def suite_columns(suite: Path) -> list[str]:
    """Return the columns for the accuracy on each set of a suite."""
    return [f"{name}_accuracy" for name in find_sets(suite)]


def train_in_child(config: Config, out: Path, conditions: Conditions, recipe: str) -> dict[str, str]:
    """Train in a child process, remove the run's folder, and return the run's figures as text.

    Each run has its own process because peak memory is a high-water mark. A figure is empty if the run lacks it, such
    as a TAR for which there are too few pairs.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
        figures = pool.submit(_figures, config, out, conditions, recipe).result()
    shutil.rmtree(out)
    with suppress(OSError):  # the folder may hold other runs
        out.parent.rmdir()
    suite = conditions.suite
    wanted = (*COLUMNS[2:], *(suite_columns(suite) if suite else ()), "images", "identities")
    return {name: f"{figures[name]:.6g}" if name in figures else "" for name in wanted}


def _figures(config: Config, out: Path, conditions: Conditions, recipe: str) -> dict[str, float]:
    figures = train(config, out, conditions.workers, conditions.in_process, overwrite=True, recipe=recipe)
    recogniser, suite = open_net(out, trust_code=True), conditions.suite  # the config names its code
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
    """Return a table, header first: each setting's runs, and mean ± standard deviation over them of each column."""
    table: list[tuple[str, ...]] = [("setting", "runs", *(heading(column) for column in columns))]
    for name in dict.fromkeys(row["setting"] for row in rows):
        runs = [row for row in rows if row["setting"] == name]
        cells = []
        for column in columns:
            _, factor, digits = SHOWN.get(column, SHOWN["accuracy"])
            values = [factor * float(row[column]) for row in runs if row.get(column)]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        table.append((name, str(len(runs)), *cells))
    return table


def differences(rows: list[dict[str, str]], baseline: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a table, header first: how far each setting lies above a baseline, with 95 % intervals.

    Runs of one seed and fold make a pair. The interval is Student's t of the pairs' differences, so it speaks of other
    seeds on these data. It needs two pairs or more.
    """
    names = dict.fromkeys([baseline, *(row["setting"] for row in rows)])
    runs = {name: [row for row in rows if row["setting"] == name] for name in names}
    table: list[tuple[str, ...]] = [(f"against {baseline}", "pairs", *(heading(column) for column in columns))]
    for name in names:
        if name == baseline:
            continue
        cells, count = [], 0
        for column in columns:
            _, factor, digits = SHOWN.get(column, SHOWN["accuracy"])
            values = [factor * value for value in paired_differences(runs[name], runs[baseline], column)]
            count = max(count, len(values))
            if len(values) < 2:
                cells.append("")
                continue
            mean, half = mean_interval(values)
            cells.append(f"{mean:+.{digits}f} ({mean - half:+.{digits}f} … {mean + half:+.{digits}f})")
        table.append((name, str(count), *cells))
    return table


def verdict(rows: list[dict[str, str]], baseline: str) -> str:
    """Say in Markdown, for each setting, whether its accuracy differs from a baseline's."""
    lines, base = [], [row for row in rows if row["setting"] == baseline]
    for name in dict.fromkeys(row["setting"] for row in rows if row["setting"] != baseline):
        values = paired_differences([row for row in rows if row["setting"] == name], base, "accuracy")
        if len(values) < 2:
            lines.append(f"- **{name}: not known**: it takes two runs or more, each beside one of {baseline}.")
            continue
        mean, half = mean_interval(values)
        found = "better" if mean > half else "worse" if mean < -half else "no difference shown"
        points = f"accuracy {100 * mean:+.2f} ± {100 * half:.2f} points against {baseline}"
        lines.append(f"- **{name}: {found}**: {points}, {len(values)} pairs of runs.")
    return "\n".join(lines)


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
