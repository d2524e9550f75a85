"""Writes the tables of the pages in ``docs/`` from ``results/*.csv``, as ``docs/tables.toml`` describes them.

``make generated`` runs this file. A page holds ``<!-- table: NAME -->`` … ``<!-- end -->``; the lines between are
replaced. A test checks that no page differs from what this file would write.
"""

import csv
import statistics
import tomllib
from pathlib import Path
from typing import Any

from pipelines.experiments.paired import mean_interval, paired_differences

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results"
BEGIN, END = "<!-- table: {} -->", "<!-- end -->"

COLUMNS = {  # column of a results file -> heading, factor, format
    "accuracy": ("accuracy %", 100, ".2f"),
    "plain_accuracy": ("plain – plain %", 100, ".2f"),
    "masked_plain_accuracy": ("masked – plain %", 100, ".2f"),
    "masked_masked_accuracy": ("masked – masked %", 100, ".2f"),
    "warped_plain_accuracy": ("tested on warped %", 100, ".2f"),
    "rendered_plain_accuracy": ("tested on rendered %", 100, ".2f"),
    "tar_at_far_1e-2": ("TAR@FAR 1e-2", 1, ".3f"),
    "tar_at_far_1e-3": ("TAR@FAR 1e-3", 1, ".3f"),
    "epochs": ("epochs", 1, "g"),
    "seconds": ("seconds", 1, ".0f"),
    "images_per_second": ("images/s", 1, ",.0f"),
    "peak_memory_mib": ("peak MiB", 1, ",.0f"),
}


def read(name: str) -> list[dict[str, str]]:
    """Read a file of ``results/``."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cell(column: str, runs: list[dict[str, str]]) -> str:
    """Write one cell: a few values as they are, of three and more the mean ± the standard deviation."""
    _, factor, form = COLUMNS[column]
    values = [factor * float(run[column]) for run in runs if run.get(column)]
    if len(set(values)) == 1:
        return f"{values[0]:{form}}"
    if len(values) < 3:
        return ", ".join(f"{value:{form}}" for value in values)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def apart(column: str, runs: list[dict[str, str]], base: list[dict[str, str]]) -> str:
    """Write how far runs lie above those of another row, with the 95 % interval of the pairs."""
    _, factor, form = COLUMNS[column]
    values = [factor * value for value in paired_differences(runs, base, column)]
    if len(values) < 2:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:+{form}} ({mean - half:+{form}} … {mean + half:+{form}})"


def runs_of(spec: dict[str, Any], names: list[str]) -> list[dict[str, str]]:
    """Find the runs of one row; a name is ``SETTING`` of the table's file, or ``FILE:SETTING``.

    Raises:
        SystemExit: no file has a run of that name.
    """
    runs = []
    for name in names:
        file, _, setting = name.rpartition(":")
        matching = [run for run in read(file or spec["csv"]) if run["setting"] == setting]
        if not matching:
            raise SystemExit(f"docs/tables.toml: results/{file or spec['csv']} has no run {setting!r}")
        runs += matching
    return runs


def body(spec: dict[str, Any]) -> list[list[str]]:
    """Make the rows of one table, the heading first."""
    if "columns" not in spec:  # the file's columns are the table's
        rows = read(spec["csv"])
        return [list(rows[0]), *(list(row.values()) for row in rows)]
    more, against = spec.get("more", {}), spec.get("against")
    headings = [COLUMNS[column][0] for column in spec["columns"]]
    table = [[spec["title"], "runs", *headings, *([f"{headings[0]} against {against}"] if against else []), *more]]
    for label, *names in spec["rows"]:
        runs = runs_of(spec, names)
        cells = [cell(column, runs) for column in spec["columns"]]
        if against:
            base = next(given for name, *given in spec["rows"] if name == against)
            cells.append("" if label == against else apart(spec["columns"][0], runs, runs_of(spec, base)))
        table.append([label, str(len(runs)), *cells, *(column.get(label, "") for column in more.values())])
    return table


def markdown(table: list[list[str]]) -> str:
    """Write rows as a Markdown table, the first as its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def filled(page: str, specs: dict[str, Any]) -> str:
    """Put every table that a page names between its marks."""
    for name, spec in specs.items():
        begin = BEGIN.format(name)
        if begin in page:
            before, _, rest = page.partition(begin)
            after = rest.partition(END)[2]
            page = f"{before}{begin}\n\n{markdown(body(spec))}\n\n{END}{after}"
    return page


def pages() -> dict[Path, str]:
    """Map every page with a table to the text that it should have."""
    specs = tomllib.loads((DOCS / "tables.toml").read_text())
    found = {path: path.read_text() for path in [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]}
    return {path: filled(text, specs) for path, text in found.items() if "<!-- table: " in text}


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
