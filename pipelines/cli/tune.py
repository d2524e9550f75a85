"""The command ``bigface tune``."""

from shlex import quote
from typing import Annotated

import typer

from fr_core.data.store import to_path
from fr_core.nets.start import load_started
from pipelines.cli.app import app
from pipelines.cli.options import Json, Overrides, Recipe, any_output
from pipelines.cli.output import command_line, show_line, show_table, write_json
from tune_spaces import SPACES


@app.command(rich_help_panel="Training")
def tune(
    space: Annotated[str, typer.Argument(help=f"Space: {', '.join(SPACES)}; several: attfc+fastface.")],
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(parser=any_output, help="Folder or URL of the search.")] = "runs/tune",
    only: Annotated[
        str | None, typer.Option(help="Knobs to search, separated by commas; default: all knobs of the space.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the search.")] = 50,
    search: Annotated[str, typer.Option(help="Search algorithm: tpe, random or grid.")] = "tpe",
    stop: Annotated[str, typer.Option(help="Early stopping of bad trials: asha, median, none; or pbt.")] = "asha",
    objective: Annotated[
        str, typer.Option(help="Figure to optimise: accuracy, tar_at_far_1e-3, seconds, loss …")
    ] = "accuracy",
    against: Annotated[
        str | None, typer.Option(help="Second objective: peak_memory_mib, seconds, nominal_mib …; needs --stop none.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Verify on the training people: parts that are left out of training in turn."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search; the recipe has its own seed.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers of each trial.")] = 1,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run each trial in one process, without Ray Train.")
    ] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Trials that run at once; default: as many as fit.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="End the search after so many minutes; --resume continues it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in --out.")] = False,
    json: Json = None,
) -> None:
    """Search a recipe's knobs with Ray Tune; the best trial becomes a recipe for bigface train."""
    from pipelines.experiments.search import Search, best, table
    from pipelines.experiments.states import STATES
    from pipelines.experiments.tune import tune as run
    from tune_spaces import joined

    config = load_started(recipe, overrides or [])
    knobs = joined(space, only)
    wanted = Search(knobs, config, trials, search, stop, objective, against, seed, workers, in_process, folds, recipe)
    found, ended = run(wanted, to_path(out), at_once, minutes, resume)
    show_table(table(wanted, found), "Pareto front" if against else "best")
    figures: dict[str, float] = {state: sum(trial.state == state for trial in found) for state in STATES}
    show_line(f"{len(found)} trials: " + ", ".join(f"{count:g} {state}" for state, count in figures.items() if count))
    if winners := best(wanted, found):
        figures |= {name: winners[0].figures[name] for name in wanted.objectives}
        folder = to_path(out)
        show_line(f"all trials: {quote(str(folder / 'trials.csv'))}")
        show_line(f"next: {command_line('train', folder / 'winner.toml')}")
    if len(found) < trials or figures["interrupted"]:
        show_line("some trials are missing: run the same command with --resume to continue")
    write_json("tune", figures, json, trials=[vars(trial) for trial in found])
    if ended:
        raise typer.Exit(128 + ended)
