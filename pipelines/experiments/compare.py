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
from fr_core.config.mends import as_toml
from fr_core.config.methods import DCQ, F2C, AttFC, BaseMethod, BigFace, Margin, VirtualFC
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
    config: Config, steps: int, classes: int, flat: str, grouped: str, centres: int, scale: float
) -> dict[str, dict[str, list[str]]]:
    """Return the overrides of each setting in tables 1 to 5 of AttFC (arXiv 2025; docs/methods/attfc.md), by table.

    All share AttFC's loss, ArcFace with a margin of .5, and one scale; each keeps its other defaults. Virtual FC also
    trains on its class images, so it takes half the batch. Its rate, steps and warm-up are those of the others.

    Args:
        config: config of the recipe; all settings share its batch and epochs.
        steps: steps of a run with this batch and these epochs; with folds, of the shortest.
        classes: classes of the dataset; with folds, of the smallest.
        flat: flat shards, for FC and Partial FC.
        grouped: grouped shards of the same faces, for the other methods.
        centres: class centres of every method in table 5.
        scale: scale s of every margin.

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
        absent = [f"method.{name}=none" for name, value in method.model_dump().items() if value is None]
        return [f"data.path={shards}", f"method={as_toml(method.model_dump(exclude_none=True))}", *absent]

    def attfc(ratio: float = 0.3, count: int = 2, strategy: str = "attention") -> list[str]:
        fields = {"margin": arc, "size_ratio": ratio, "class_images": count, "strategy": strategy}
        return on(grouped, AttFC.model_validate(fields))

    virtual_fc = VirtualFC(margin=arc, anchors=centres)
    virtual = [
        f"train.global_batch={batch // 2}",
        f"train.max_steps={steps}",
        f"schedule.warmup_epochs={config.schedule.warmup_epochs / 2}",
        *([f"optim.reference_batch={meant_for // 2}"] if (meant_for := config.optim.reference_batch) else []),
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
            f"DCQ {centres}": on(grouped, DCQ(margin=arc, queue_size=centres)),
            f"F2C {centres}": on(grouped, F2C(margin=arc, pool_size=centres)),
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
    recogniser, suite = open_net(out), conditions.suite
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
