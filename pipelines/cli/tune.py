"""``bigface tune``."""

from typing import Annotated

import typer

from fr_core.config.recipes import load_config
from fr_core.data.store import to_path
from pipelines.cli.app import app
from pipelines.cli.options import Json, Overrides, Recipe, any_output
from pipelines.cli.output import console, show, show_table


@app.command(rich_help_panel="Training")
def tune(
    space: Annotated[
        str, typer.Argument(help="attfc, fastface, haar, bigface, distill, quantface; or attfc+fastface.")
    ],
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(parser=any_output, help="Folder of the search, or a URL.")] = "runs/tune",
    only: Annotated[str | None, typer.Option(help="Knobs of the space, with commas between; default: all.")] = None,
    trials: Annotated[int, typer.Option(min=1)] = 50,
    search: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    stop: Annotated[str, typer.Option(help="Of trials that look bad: asha, median, none; or pbt.")] = "asha",
    objective: Annotated[str, typer.Option(help="accuracy, tar_at_far_1e-3, seconds, loss …")] = "accuracy",
    against: Annotated[
        str | None, typer.Option(help="A second one: peak_memory_mib, seconds, nominal_mib …; needs --stop none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search; the recipe has its own.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers of each trial.")] = 1,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="A trial is one process, without Ray Train.")
    ] = False,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials at once; default: as many as fit.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="End after this; --resume goes on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")] = False,
    json: Json = None,
) -> None:
    """Search a recipe's knobs by Ray Tune; the best becomes a recipe that bigface train runs."""
    from pipelines.experiments.search import Search, best, table
    from pipelines.experiments.tune import tune as run
    from tune_spaces import joined

    config = load_config(recipe, overrides or [])
    wanted = Search(joined(space, only), config, trials, search, stop, objective, against, seed, workers, in_process)
    found, ended = run(wanted, to_path(out), at_once, minutes, resume)
    show_table(table(wanted, found), "Pareto front" if against else "best")
    states = ("finished", "stopped", "failed", "interrupted")
    figures: dict[str, float] = {state: sum(trial.state == state for trial in found) for state in states}
    if winners := best(wanted, found):
        figures |= {name: winners[0].figures[name] for name in wanted.objectives}
        folder = to_path(out)
        console.print(f"recipe of the best: {folder / 'winner.toml'}   all: {folder / 'trials.csv'}", markup=False)
    if len(found) < trials or figures["interrupted"]:
        console.print("not all trials are done: the same command with --resume goes on")
    show("tune", figures, json, trials=[vars(trial) for trial in found])
    if ended:
        raise typer.Exit(128 + ended)
