"""Commands that train, and those that plan a training or learn from past ones."""

import time
from collections import Counter
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fr_core.config import distillation
from fr_core.config.recipes import load_config
from fr_core.data.store import explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import (
    Json,
    OneWorker,
    Overrides,
    Overwrite,
    Recipe,
    Resume,
    RunFolder,
    WorkerRange,
    local,
    output,
)
from pipelines.cli.output import console, show, show_table


@app.command(rich_help_panel="Training")
def demo(
    out: Annotated[Path, typer.Option(parser=output, help="Folder of the run.")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(min=1)] = 2,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Synthetic faces → shards → Ray Data → Ray Train → verification on unseen identities, in about five minutes."""
    from pipelines.demo import demo as run

    with explain_disk_errors(out):
        figures = run(out, workers, "demo", overrides or [], console.print)
    show("demo", figures, json)
    console.print(f"report: {out / 'report.json'}   pictures: {out / 'pictures'}", markup=False)


@app.command(rich_help_panel="Training")
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: RunFolder = None,
    workers: WorkerRange = 1,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Train a recipe; key.path=value overrides its fields."""
    from pipelines.train import train as run

    config = load_config(recipe, overrides or [])
    out = out or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    show("train", run(config, to_path(out), workers, in_process, resume, overwrite), json)
    console.print(f"run: {out}   use it: bigface match A.jpg B.jpg --model {out}", markup=False)


@app.command(rich_help_panel="Training")
def distill(
    recipe: Recipe,
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help="A run, a checkpoint, FILE.onnx, or weights.safetensors.")] = None,
    teacher_net: Annotated[str | None, typer.Option(help="For bare weights: mobilefacenet or iresnetDEPTH.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Instead of --teacher: what bigface embed made of it.")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="More flat shards, whose labels are not looked at.")] = None,
    out: RunFolder = None,
    workers: WorkerRange = 1,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Train a recipe that also follows a teacher; the options are its method.distill, and key.path=value the rest."""
    options = {"teacher": teacher, "teacher_net": teacher_net, "embeddings": embeddings, "unlabelled.path": unlabelled}
    given = [*(overrides or []), *(f"method.distill.{name}={dumps(value)}" for name, value in options.items() if value)]
    if (method := load_config(recipe).method).kind != "bigface":
        raise UserError(f"{recipe}: only bigface, the method with a class matrix, distils, not {method.kind}")
    if distillation(load_config(recipe, given)) is None:
        raise UserError("nobody to learn from: give --teacher REF, or --embeddings DIR")
    train(recipe, given, out, workers, in_process, resume, overwrite, json)


@app.command(rich_help_panel="Training")
def plan(
    recipe: Recipe,
    identities: Annotated[int, typer.Option(min=1, help="Of the training set.")],
    gpus: Annotated[int, typer.Option(min=1, help="Workers, one card each.")] = 1,
    gpu_gib: Annotated[float, typer.Option("--gpu-gib", min=0.1, help="Memory of one card.")] = 24.0,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Say before a run whether it fits the card: memory by part, per head and mode, and the first knob to turn."""
    from pipelines.experiments.plan import plan as run

    config = load_config(recipe, overrides or [])
    auto = ' train.precision = "auto" is counted as bfloat16.' if config.train.precision == "auto" else ""
    console.print(
        f"{recipe}, {identities:,} identities, {gpus} × {gpu_gib:g} GiB. Computed, not yet checked on a card.{auto}"
    )
    rows, advice, figures = run(config, identities, gpus, gpu_gib)
    show_table(rows, "GiB per card")
    console.print(advice)
    show("plan", figures, json)


@app.command(rich_help_panel="Training")
def replay(
    log: Annotated[Path, typer.Argument(help="CSV of step, loss or of last_step, mean_loss.")],
    form: Annotated[str, typer.Option(help="recurrence or haar.")] = "recurrence",
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of the schedule; again for more.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Global batch of the log.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Base rate; default: the log's first, else 0.1.")] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=output, help="Draw loss, detector and rate into this PNG.")
    ] = None,
    json: Json = None,
) -> None:
    """Tell what FastFace would have done on a past loss log."""
    from pipelines.experiments.replay import replay as run

    changes, steps, figure = run(log, form, set_ or [], batch, lr)
    table = Table("step", "factor", "rate", title=f"{form} on {steps:,} steps")
    for change in changes:
        table.add_row(f"{change['step']:,}", f"{change['factor']:g}", f"{change['rate']:.6g}")
    console.print(table)
    if picture:
        with explain_disk_errors(picture):
            figure.savefig(picture, format="png")
        console.print(f"picture: {picture}", markup=False)
    show("replay", {"steps": steps, "changes": len(changes)}, json, changes=changes)


@app.command(rich_help_panel="Training")
def scaling(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs; none: all of an MLflow experiment.")
    ] = None,
    figure: Annotated[
        str, typer.Option(help="accuracy, tar_at_far_1e-3, mfr …; of a later verification NAME/FIGURE.")
    ] = "accuracy",
    uri: Annotated[str, typer.Option(help="Of MLflow.")] = "sqlite:///runs/mlflow.db",
    experiment: Annotated[str, typer.Option(help="In MLflow.")] = "bigface",
    query: Annotated[str, typer.Option("--filter", help="MLflow's, such as \"params.`net.width` = '16'\".")] = "",
    predict: Annotated[
        str | None, typer.Option(help="Parameters, such as 600M or 1.2e9; default: twice the largest run's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=output, help="PNG of runs, law and prediction.")] = None,
    json: Json = None,
) -> None:
    """Fit error as a power law of parameters over finished runs, and predict the next size."""
    from pipelines.experiments.scaling import findings, run_table, scaling_figure, scaling_figures
    from pipelines.experiments.scaling import scaling as run

    found = run(runs or [], figure, uri, experiment, query, predict)
    show_table(run_table(found), figure)
    for name, reason in found.left_out:
        console.print(f"[yellow]left out: {escape(name)}: {escape(reason)}[/]")
    for finding in findings(found):
        console.print(finding)
    if out:
        with explain_disk_errors(out):
            scaling_figure(found, figure).savefig(out, format="png")
    show("scaling", scaling_figures(found), json, runs=[asdict(run) for run in found.runs], left_out=found.left_out)


@app.command(rich_help_panel="Training")
def runs(
    folder: Annotated[
        Path | None, typer.Argument(parser=local, help="Of runs; default: runs, or what --uri names alone.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="Of MLflow; default: FOLDER/mlflow.db.")] = None,
    experiment: Annotated[str | None, typer.Option(help="In MLflow; default: all.")] = None,
    query: Annotated[str, typer.Option("--filter", help="MLflow's, such as \"params.`method.kind` = 'attfc'\".")] = "",
    sort: Annotated[str, typer.Option(help="started, name, or a figure such as accuracy, best first.")] = "started",
    limit: Annotated[int, typer.Option(min=1, help="Runs shown; children of searches come with theirs.")] = 20,
    json: Json = None,
) -> None:
    """List runs with their scores, newest first; those of comparisons and searches under them."""
    from pipelines.experiments.runs import run_facts, run_table
    from pipelines.experiments.runs import runs as find

    trees = find(folder or (None if uri else Path("runs")), uri, experiment, query, sort, limit)
    show_table(run_table(trees), "runs")
    facts = run_facts(trees)
    states = Counter(fact["state"].lower() for fact in facts)
    show("runs", {"runs": len(facts), **states}, json, runs=facts)
