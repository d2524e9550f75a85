"""``bigface compare``: the same data and net under several settings and seeds, one finished run a line of a CSV.

A line that is there is not run again, so a comparison goes on where it was stopped; ``--minutes`` ends it between runs.
"""

import csv
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fr_core.config import Config, load_config
from fr_core.errors import UserError
from pipelines.train import train

COLUMNS = (
    *("setting", "seed", "accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "seconds", "epochs", "loss"),
    *("images_per_second", "peak_memory_mib", "classes_mib"),
)
FACTS = ("images", "identities", "overrides", "commit")


def schedules(epochs: int, fast_epochs: int, fastface: list[str]) -> dict[str, list[str]]:
    """Overrides of the settings that FastFace is judged by: the recipe in full, and two ways to spend a quarter."""
    watching = ["schedule={kind='fastface'}", *(f"schedule.{setting}" for setting in fastface)]
    return {
        "full": [f"train.epochs={epochs}"],
        "cosine": [f"train.epochs={fast_epochs}", "schedule={kind='cosine'}"],
        "fastface": [f"train.epochs={fast_epochs}", *watching],
    }


def named_settings(given: list[str]) -> dict[str, list[str]]:
    """Settings written as ``NAME: key.path=value …``.

    Raises:
        UserError: no name, or a name twice.
    """
    settings: dict[str, list[str]] = {}
    for text in given:
        name, colon, overrides = text.partition(":")
        if not colon or not name.strip() or "=" in name:
            raise UserError(f"--setting {text!r}: write NAME: key.path=value …")
        if name.strip() in settings:
            raise UserError(f"--setting {name.strip()} is there twice")
        settings[name.strip()] = shlex.split(overrides)
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
) -> list[dict[str, str]]:
    """Runs what is missing in ``results`` and returns its lines that belong to these settings and seeds.

    Raises:
        UserError: no pairs to verify on, or a results file of another comparison.
    """
    configs = {
        (name, seed): load_config(recipe, [*overrides, *extra, f"seed={seed}"])
        for seed in seeds
        for name, extra in settings.items()
    }
    if any(config.verify.pairs is None for config in configs.values()):
        raise UserError("nothing to compare by: give verify.images=DIR verify.pairs=FILE")
    started, rows = time.monotonic(), read_results(results)
    done = {(row["setting"], int(row["seed"])): row for row in rows}
    for (name, seed), config in configs.items():
        given = shlex.join([recipe, *overrides, *settings[name]])
        if (name, seed) in done:
            if done[name, seed]["overrides"] != given:
                raise UserError(f"{results}: {name}, seed {seed} was run as {done[name, seed]['overrides']}")
            continue
        if time.monotonic() - started > 60 * minutes:
            say(f"{minutes:g} minutes are over; the same command goes on with {name}, seed {seed}")
            break
        say(f"{name}, seed {seed} …")
        row = {"setting": name, "seed": str(seed)} | one_run(config, results.with_suffix(""), workers, in_process)
        row |= {"overrides": given, "commit": commit()}
        append(results, row)
        done[name, seed] = row
        say(f"{name}, seed {seed}: accuracy {float(row['accuracy']):.4f} in {float(row['seconds']):.0f} s")
    return [done[key] for key in configs if key in done]


def one_run(config: Config, folder: Path, workers: int, in_process: bool) -> dict[str, str]:
    """Trains into a folder that goes afterwards; its figures, empty where there are too few pairs for one.

    In a process of its own, since peak memory is a high-water mark.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        figures = pool.submit(train, config, folder / "run", workers, in_process, overwrite=True).result()
    shutil.rmtree(folder)
    wanted = (*COLUMNS[2:], "images", "identities")
    return {name: f"{figures[name]:.6g}" if name in figures else "" for name in wanted}


SHOWN = {  # column -> heading, factor, digits
    "accuracy": ("accuracy %", 100, 2),
    "tar_at_far_1e-2": ("TAR@FAR 1e-2", 1, 3),
    "tar_at_far_1e-3": ("TAR@FAR 1e-3", 1, 3),
    "seconds": ("seconds", 1, 0),
    "images_per_second": ("images/s", 1, 0),
    "peak_memory_mib": ("peak memory, MiB", 1, 0),
    "classes_mib": ("classes, MiB", 1, 2),
}


def summary(rows: list[dict[str, str]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """A table, header first. Per setting: runs, and mean ± standard deviation over seeds of each column."""
    table: list[tuple[str, ...]] = [("setting", "runs", *(SHOWN[column][0] for column in columns))]
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        cells = []
        for column in columns:
            _, factor, digits = SHOWN[column]
            values = [factor * float(row[column]) for row in own if row[column]]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        table.append((name, str(len(own)), *cells))
    return table


def markdown(table: list[tuple[str, ...]]) -> str:
    """The table as README shows it."""
    lines = [table[0], tuple("---" for _ in table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read_results(path: Path) -> list[dict[str, str]]:
    """Lines of a results file; none if it is not there yet.

    Raises:
        UserError: it is something else.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS + FACTS:
            raise UserError(f"{path}: not a results file of bigface compare")
        return list(reader)


def append(path: Path, row: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + FACTS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """Of the source tree that runs, or "" outside of one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip()
