"""``bigface compare``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fr_core.config.recipes import load_config, recipes
from fr_core.data.store import explain_disk_errors
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import Json, OneWorker, Overrides, Recipe, local, output
from pipelines.cli.output import console, show, show_table

comparisons = typer.Typer(no_args_is_help=True, help="Settings compared on the same data, net and seeds; resumable.")
app.add_typer(comparisons, name="compare", rich_help_panel="Measuring")
Results = Annotated[Path, typer.Option(parser=output, help="CSV that finished runs are appended to.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each setting.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin no run later than this.")]


@comparisons.command("schedules")
def compare_schedules(
    recipe: Recipe,
    epochs: Annotated[int, typer.Option(min=1, help="Of the recipe's own schedule.")],
    fast_epochs: Annotated[int, typer.Option(min=1, help="Of FastFace and of cosine beside it.")],
    results: Results,
    seeds: Seeds = 3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of FastFace; again for more.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """The recipe in full, against FastFace and cosine in fewer epochs: accuracy and time over seeds."""
    from pipelines.experiments.compare import schedules

    settings = schedules(load_config(recipe, overrides or []), epochs, fast_epochs, set_ or [])
    columns = ("accuracy", "tar_at_far_1e-3", "seconds")
    compared("schedules", recipe, settings, overrides, seeds, results, workers, in_process, minutes, columns, json)


@comparisons.command("heads")
def compare_heads(
    recipe: Annotated[str, typer.Option(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    flat: Annotated[str, typer.Option(help="Flat shards, for FC and Partial FC.")],
    grouped: Annotated[str, typer.Option(help="The same faces as grouped shards, for the others.")],
    results: Results,
    centres: Annotated[int, typer.Option(min=2, help="Of every method in table 5.")] = 512,
    scale: Annotated[float, typer.Option(min=1, help="Of every margin.")] = 64,
    momentum: Annotated[
        float, typer.Option(min=0, max=0.9999, help="Of every momentum encoder; less in a short run.")
    ] = 0.999,
    tables: Annotated[str, typer.Option(help="Of the paper: any of 1, 3, 4, 5.")] = "1345",
    seeds: Seeds = 1,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """FC, Partial FC, Virtual FC, DCQ, F2C and AttFC as in AttFC's tables, with the paper's figures beside."""
    from fr_core.config import class_count, total_steps
    from fr_core.data.schema import open_dataset
    from fr_core.data.stream import make_plan
    from pipelines.experiments.compare import PUBLISHED, heads

    config = load_config(recipe, [*(overrides or []), f"data.path={flat}", "method={kind='bigface'}"])
    one, other = open_dataset(flat).manifest, open_dataset(grouped).manifest
    if (one.images, one.identities) != (other.images, other.identities):
        raise UserError(
            f"{flat} holds {one.images} images of {one.identities} identities, {grouped} {other.images} of "
            f"{other.identities}: ingest the same faces in both layouts"
        )
    if not tables or set(tables) - set("1345"):
        raise UserError(f"--tables {tables}: any of 1, 3, 4, 5, such as 15")
    steps = total_steps(config, make_plan(config, open_dataset(flat)).steps_per_epoch)
    by_table = heads(config, steps, class_count(config, one.identities), flat, grouped, centres, scale, momentum)
    settings = {k: v for title, group in by_table.items() if title[0] in tables for k, v in group.items()}
    columns = ("accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "peak_memory_mib", "images_per_second", "classes_mib")
    given = (recipe, settings, overrides, seeds, results, workers, in_process, minutes, columns, json)
    compared("heads", *given, published=PUBLISHED)


@comparisons.command("settings")
def compare_settings(
    recipe: Recipe,
    results: Results,
    setting: Annotated[list[str] | None, typer.Option(help="'NAME: key.path=value …'; again for more.")] = None,
    suite: Annotated[
        Path | None, typer.Option(parser=local, help="Folder of sets; every run is verified on each.")
    ] = None,
    seeds: Seeds = 1,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    in_process: OneWorker = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Any settings of a recipe against each other."""
    from pipelines.experiments.compare import named_settings, suite_columns

    settings = named_settings(setting or [])
    columns = ("accuracy", "tar_at_far_1e-3", *(suite_columns(suite) if suite else ()), "seconds")
    given = (recipe, settings, overrides, seeds, results, workers, in_process, minutes, columns, json)
    compared("settings", *given, suite=suite)


def compared(
    name: str,
    recipe: str,
    settings: Mapping[str, list[str]],
    overrides: list[str] | None,
    seeds: int,
    results: Path,
    workers: int,
    in_process: bool,
    minutes: float,
    columns: tuple[str, ...],
    json: Path | None,
    published: Mapping[str, str] | None = None,
    suite: Path | None = None,
) -> None:
    """Runs a comparison and shows its table, also as the Markdown that README holds.

    ``published`` adds the papers' figures, by setting or by its name without the number of centres.
    """
    from fr_core.verify.report import markdown
    from pipelines.experiments.compare import compare, summary

    with explain_disk_errors(results):
        rows = compare(
            recipe,
            settings,
            overrides or [],
            list(range(seeds)),
            results,
            workers,
            in_process,
            minutes,
            console.print,
            suite,
        )
    cells = summary(rows, columns)
    if published:
        named = [published.get(row[0]) or published.get(row[0].split()[0], "") for row in cells[1:]]
        cells = [(*row, last) for row, last in zip(cells, ["published", *named], strict=True)]
    show_table(cells, str(results))
    console.print(markdown(cells), highlight=False, soft_wrap=True)
    figures = {"runs": len(rows), "wanted": seeds * len(settings)}
    show(f"compare {name}", figures, json, rows=rows)
