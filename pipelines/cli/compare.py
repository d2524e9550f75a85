"""``bigface compare``."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fr_core.config.recipes import recipes
from fr_core.data.store import explain_disk_errors, to_path
from fr_core.errors import UserError
from fr_core.nets.start import load_started
from pipelines.cli.app import app
from pipelines.cli.options import Json, OneWorker, Overrides, Recipe, Workers, local, output
from pipelines.cli.output import show_line, show_table, write_json

if TYPE_CHECKING:
    from pipelines.experiments.compare import Conditions

comparisons = typer.Typer(no_args_is_help=True, help="Compare settings on the same data, net and seeds; resumable.")
app.add_typer(comparisons, name="compare", rich_help_panel="Measuring")
Results = Annotated[Path, typer.Option(parser=output, help="CSV file that finished runs are appended to.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each setting.")]
Folds = Annotated[
    int | None, typer.Option(min=2, help="Verify on the training people: parts that are left out of training in turn.")
]
Against = Annotated[str | None, typer.Option(help="Setting that the others are set against; default: the first.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin no run after this many minutes.")]


@comparisons.command("schedules")
def compare_schedules(
    recipe: Recipe,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the recipe with its own schedule.")],
    fast_epochs: Annotated[int, typer.Option(min=1, help="Epochs of FastFace, and of cosine to compare with.")],
    results: Results,
    seeds: Seeds = 3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of FastFace; repeatable.")] = None,
    folds: Folds = None,
    against: Against = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    markdown: Markdown = False,
    json: Json = None,
) -> None:
    """Compare a recipe in full with FastFace and cosine in fewer epochs: accuracy and time over seeds."""
    from pipelines.experiments.compare import Conditions
    from pipelines.experiments.settings import schedules

    settings = schedules(epochs, fast_epochs, set_ or [])
    columns = ("accuracy", "tar_at_far_1e-3", "seconds")
    conditions = Conditions(results, list(range(seeds)), folds, workers, in_process, minutes, against=against)
    run_comparison("schedules", recipe, settings, overrides, conditions, columns, markdown, json)


@comparisons.command("heads")
def compare_heads(
    recipe: Annotated[str, typer.Option(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    flat: Annotated[str, typer.Option(help="Flat shards, for FC and Partial FC.")],
    grouped: Annotated[str, typer.Option(help="Grouped shards of the same faces, for the other methods.")],
    results: Results,
    centres: Annotated[int, typer.Option(min=2, help="Class centres of every method in table 5.")] = 512,
    scale: Annotated[float, typer.Option(min=1, help="Scale of every margin.")] = 64,
    tables: Annotated[str, typer.Option(help="Tables of AttFC's paper: any of 1, 3, 4, 5.")] = "1345",
    seeds: Seeds = 1,
    folds: Folds = None,
    against: Against = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    markdown: Markdown = False,
    json: Json = None,
) -> None:
    """Compare FC, Partial FC, Virtual FC, DCQ, F2C and AttFC as AttFC's tables do, beside the published figures."""
    from fr_core.config import class_count, total_steps
    from fr_core.data.schema import open_dataset
    from fr_core.data.stream import make_plan
    from pipelines.datasets.split import folds_of
    from pipelines.experiments.compare import Conditions
    from pipelines.experiments.settings import PUBLISHED, heads

    config = load_started(recipe, [*(overrides or []), f"data.path={flat}", "method.kind=bigface"])
    flat_facts, grouped_facts = open_dataset(flat).manifest, open_dataset(grouped).manifest
    if (flat_facts.images, flat_facts.identities) != (grouped_facts.images, grouped_facts.identities):
        raise UserError(
            f"{flat} holds {flat_facts.images} images of {flat_facts.identities} identities, {grouped} "
            f"{grouped_facts.images} of {grouped_facts.identities}: ingest the same faces in both layouts"
        )
    if not tables or set(tables) - set("1345"):
        raise UserError(f"--tables {tables}: give any of 1, 3, 4, 5, such as 15")
    conditions = Conditions(results, list(range(seeds)), folds, workers, in_process, minutes, against=against)
    trained = [fold.train for fold in folds_of(to_path(flat), conditions.folder, folds)] if folds else [flat]
    plans = [make_plan(config, open_dataset(shards)) for shards in trained]
    classes = min(class_count(config, plan.dataset.manifest.identities) for plan in plans)
    steps = min(total_steps(config, plan.steps_per_epoch) for plan in plans)
    by_table = heads(config, steps, classes, flat, grouped, centres, scale)
    settings = {k: v for title, group in by_table.items() if title[0] in tables for k, v in group.items()}
    columns = ("accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "peak_memory_mib", "images_per_second", "classes_mib")
    run_comparison("heads", recipe, settings, overrides, conditions, columns, markdown, json, PUBLISHED)


@comparisons.command("margins")
def compare_margins(
    recipe: Recipe,
    results: Results,
    seeds: Seeds = 1,
    folds: Folds = None,
    against: Against = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    markdown: Markdown = False,
    json: Json = None,
) -> None:
    """Compare the margins of a class matrix with each other, all at the recipe's scale."""
    from pipelines.experiments.compare import Conditions
    from pipelines.experiments.settings import margins

    settings = margins(load_started(recipe, overrides or []))
    columns = ("accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "peak_memory_mib", "seconds")
    conditions = Conditions(results, list(range(seeds)), folds, workers, in_process, minutes, against=against)
    run_comparison("margins", recipe, settings, overrides, conditions, columns, markdown, json)


@comparisons.command("settings")
def compare_settings(
    recipe: Recipe,
    results: Results,
    setting: Annotated[list[str] | None, typer.Option(help="'NAME: key.path=value …'; repeatable.")] = None,
    suite: Annotated[
        Path | None, typer.Option(parser=local, help="Folder of sets of pairs; every run is verified on each set.")
    ] = None,
    seeds: Seeds = 1,
    folds: Folds = None,
    against: Against = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    markdown: Markdown = False,
    json: Json = None,
) -> None:
    """Compare any settings of a recipe with each other."""
    from pipelines.experiments.compare import Conditions, suite_columns
    from pipelines.experiments.settings import named_settings

    settings = named_settings(setting or [])
    for name, extra in settings.items():
        load_started(recipe, overrides or [], extra, f"--setting {shlex.quote(name)}")
    columns = ("accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", *(suite_columns(suite) if suite else ()), "seconds")
    conditions = Conditions(results, list(range(seeds)), folds, workers, in_process, minutes, suite, against)
    run_comparison("settings", recipe, settings, overrides, conditions, columns, markdown, json)


def run_comparison(
    name: str,
    recipe: str,
    settings: Mapping[str, list[str]],
    overrides: list[str] | None,
    conditions: "Conditions",
    columns: tuple[str, ...],
    markdown: bool,
    json: Path | None,
    published: Mapping[str, str] | None = None,
) -> None:
    """Run a comparison and print its tables.

    Args:
        columns: columns of the results that the tables summarise.
        markdown: print the tables as Markdown.
        published: published figures by setting, or by its name without the number of centres; they become a column.

    Raises:
        UserError: as :func:`pipelines.experiments.compare.compare`.
    """
    from fr_core.verify.report import markdown as as_markdown
    from pipelines.experiments.compare import compare, differences, summary

    results = conditions.results
    with explain_disk_errors(results):
        rows = compare(recipe, settings, overrides or [], conditions, show_line)
    cells = summary(rows, columns)
    if published:
        named = [published.get(row[0]) or published.get(row[0].split()[0], "") for row in cells[1:]]
        cells = [(*row, last) for row, last in zip(cells, ["published", *named], strict=True)]
    apart = differences(rows, conditions.against or next(iter(settings)), columns)
    for table in [cells, *([apart] if any(int(row[1]) > 1 for row in apart[1:]) else [])]:
        if markdown:
            show_line(as_markdown(table))
        else:
            show_table(table, str(results))
    runs = len(conditions.seeds) * len(settings) * (conditions.folds or 1)
    figures = {"runs": len(rows), "wanted": runs}
    show_line(f"{figures['runs']} of {figures['wanted']} runs are finished: {shlex.quote(str(results))}")
    write_json(f"compare {name}", figures, json, rows=rows)
