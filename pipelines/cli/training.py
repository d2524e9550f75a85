"""Commands that train, and commands that plan a training or learn from past ones."""

import shlex
import time
from collections import Counter
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from fr_core.config import Config, distillation
from fr_core.config.recipes import load_config
from fr_core.config.sections import expand_home
from fr_core.data.schema import open_dataset
from fr_core.data.store import AnyPath, explain_disk_errors, to_path
from fr_core.errors import UserError
from fr_core.nets.start import load_started
from pipelines.cli.app import app
from pipelines.cli.options import (
    NET,
    NET_NAME,
    Json,
    OneWorker,
    Overrides,
    Overwrite,
    Recipe,
    Resume,
    RunFolder,
    TrustCode,
    Wait,
    WorkerRange,
    local,
    output,
)
from pipelines.cli.output import command_line, count_of, show, show_line, show_lines, show_table, write_json
from pipelines.machines import WAIT


@app.command(rich_help_panel="Training")
def demo(
    out: Annotated[Path, typer.Option(parser=output, help="Folder of the run.")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 2,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Draw faces, ingest them, train, and verify on unseen identities, in about five minutes."""
    from pipelines.demo import demo as run

    with explain_disk_errors(out):
        figures = run(out, workers, "demo", overrides or [], show_line)
    show("demo", figures, json)
    show_line(f"report: {quoted(out / 'report.json')}   pictures: {quoted(out / 'pictures')}")
    show_line(f"next: {match_command(out)}")


@app.command(rich_help_panel="Training")
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: RunFolder = None,
    workers: WorkerRange = 1,
    wait: Wait = WAIT,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Train a recipe; key.path=value overrides its fields.

    The last lines name the next commands.
    """
    from pipelines.nets.match import verify_command
    from pipelines.train import train as run
    from pipelines.train import written_report

    config = load_started(recipe, trusting(overrides, trust_code))
    folder = to_path(out or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    report_before = written_report(folder) if resume else None
    show("train", run(config, folder, workers, in_process, resume, overwrite, recipe, wait), json)
    if report_before and report_before == written_report(folder):
        show_line(finished_text(config, folder))
    show_line(f"run: {quoted(folder)}")
    if config.verify.pairs:
        show_line(f"next: {match_command(folder)}")
    else:
        show_line(f"next: {verify_command(str(folder), None, config.model_dump(mode='json'))}")
        show_line(f"then: {match_command(folder)}")


def trusting(overrides: list[str] | None, trust_code: bool) -> list[str]:
    """Return the overrides, with the one that ``--trust-code`` stands for."""
    return [*(overrides or []), *(["train.trust_code=true"] if trust_code else [])]


def quoted(path: object) -> str:
    """Return a path as one writes it in a shell."""
    return shlex.quote(str(path))


def match_command(run: object) -> str:
    """Return the command that compares two photos by a run."""
    return command_line("match", "A.jpg", "B.jpg", "--model", run)


def finished_text(config: Config, out: AnyPath) -> str:
    """Return what to say of a run that was finished before it was resumed."""
    limits = f"a larger train.epochs (now {config.train.epochs})"
    if config.train.max_steps:
        limits += f" and train.max_steps (now {config.train.max_steps})"
    return (
        f"the run is finished: nothing was trained; its report: {quoted(out / 'report.json')}; "
        f"to train longer, repeat the command with {limits}"
    )


@app.command(rich_help_panel="Training")
def distill(
    recipe: Recipe,
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help=f"Teacher: {NET[0].lower()}{NET[1:]}")] = None,
    teacher_net: Annotated[str | None, typer.Option(help=NET_NAME)] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="The teacher's embeddings, made by bigface embed, instead of --teacher.")
    ] = None,
    unlabelled: Annotated[str | None, typer.Option(help="More flat shards; their labels are not used.")] = None,
    out: RunFolder = None,
    workers: WorkerRange = 1,
    wait: Wait = WAIT,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Train a recipe that also follows a teacher.

    The options set method.distill; key.path=value overrides other fields.
    """
    options = {"teacher": teacher, "teacher_net": teacher_net, "embeddings": embeddings, "unlabelled.path": unlabelled}
    distill_overrides = [f"method.distill.{name}={dumps(value)}" for name, value in options.items() if value]
    all_overrides = [*trusting(overrides, trust_code), *distill_overrides]
    if (method := load_config(recipe).method).kind != "bigface":
        raise UserError(
            f"{recipe}: its method is {method.kind}, and only bigface distils: give a recipe with method.kind=bigface"
        )
    distilled = distillation(load_config(recipe, all_overrides))
    if distilled is None or not (distilled.teacher or distilled.embeddings):
        raise UserError("no teacher: give --teacher REF or --embeddings DIR")
    train(recipe, all_overrides, out, workers, wait, in_process, resume, overwrite, json=json)


@app.command(rich_help_panel="Training")
def plan(
    recipe: Recipe,
    identities: Annotated[
        int | None, typer.Option(min=1, help="Identities of the training set; default: those of data.path.")
    ] = None,
    gpus: Annotated[
        int, typer.Option("--workers", "--gpus", min=1, help="Workers of the run, with one card each.")
    ] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of card, such as h100 or rtx4090: predicts the time of a step, too.")
    ] = None,
    gpu_gib: Annotated[
        float | None,
        typer.Option("--gpu-gib", min=0.1, help="Memory of one card, GiB; default: that of --gpu, or 24."),
    ] = None,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="Cards of a node.")] = 8,
    network: Annotated[float, typer.Option(min=0.01, help="Network of a node, GB/s one way.")] = 12.5,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the training set; default: those of data.path.")
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-3, help="Measured throughput of all cards, as a run's report has it.")
    ] = None,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Say before a run whether it fits its cards, which knob to turn first if not, and how long it takes."""
    from pipelines.experiments.cards import card_of
    from pipelines.experiments.plan import batch_text, duration, main_memory
    from pipelines.experiments.plan import plan as run
    from pipelines.experiments.step_time import precisions_on, predicted, time_figures, time_lines, time_table

    config = load_started(recipe, trusting(overrides, trust_code))
    manifest, card = None, card_of(gpu) if gpu else None
    gpu_gib = gpu_gib or (card.gib if card else 24.0)
    if identities is None:
        if not config.data.path:
            raise UserError("unknown number of identities: give --identities N, or data.path=SHARDS with a manifest")
        manifest = open_dataset(config.data.path).manifest
        identities, images = manifest.identities, images or manifest.images
    rows, advice, memory_figures = run(config, identities, gpus, gpu_gib)
    host_text, host_figures = main_memory(config, identities, images, gpus, manifest)
    cards = f"{gpus} × {card.name}, {gpu_gib:g} GiB" if card else f"{gpus} × {gpu_gib:g} GiB"
    if card:
        step = predicted(config, identities, gpus, card, per_node, network)
        images_per_second = images_per_second or step.images_per_second * (1 - step.checkpoint_share)
    time_text, run_figures = duration(config, images, images_per_second)
    show_line(f"{recipe}: {identities:,} identities, {cards}")
    show_line(batch_text(config, gpus))
    show_table(rows, "GiB per card")
    show_line(advice)
    if host_text:
        show_line(host_text)
    if card:
        show_table(time_table(step), f"One step of rank 0, predicted for {cards}")
        for line in time_lines(config, step, gpus, per_node):
            show_line(line)
        run_figures |= time_figures(step, gpus)
    show_line(time_text)
    half = precisions_on(config, card)[0] if card else "bfloat16"
    auto = f' train.precision = "auto" is counted as {half}.' if config.train.precision == "auto" else ""
    show_line(f"Memory is computed, not yet checked on a card.{auto}")
    batch = config.train.global_batch
    sizes = {"identities": identities, "cards": gpus, "global_batch": batch, "images_per_card": batch // gpus}
    write_json("plan", sizes | memory_figures | host_figures | run_figures, json)


@app.command(rich_help_panel="Training")
def replay(
    log: Annotated[Path, typer.Argument(parser=local, help="CSV with columns step, loss, or last_step, mean_loss.")],
    form: Annotated[str, typer.Option(help="Form of FastFace: run, recurrence or haar.")] = "run",
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of the schedule; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Global batch of the logged run.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Base rate; default: the first rate in the log, else 0.1.")] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=output, help="PNG file for curves of loss, detector and rate.")
    ] = None,
    json: Json = None,
) -> None:
    """Show when FastFace would have changed the rate on a past loss log."""
    from pipelines.experiments.replay import replay as run

    changes, steps, figure = run(log, form, set_ or [], batch, lr)
    title = f"{form} on {steps:,} steps"
    rows = [(f"{change['step']:,}", f"{change['factor']:g}", f"{change['rate']:.6g}") for change in changes]
    if rows:
        show_table([("step", "factor", "rate"), *rows], title)
    else:
        show_line(f"{title}: the rate never changes")
    if picture:
        with explain_disk_errors(picture):
            figure.savefig(picture, format="png")
        show_line(f"picture: {quoted(picture)}")
    write_json("replay", {"steps": steps, "changes": len(changes)}, json, changes=changes)


@app.command(rich_help_panel="Training")
def scaling(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs; default: all runs of an MLflow experiment.")
    ] = None,
    figure: Annotated[
        str, typer.Option(help="accuracy, tar_at_far_1e-3, mfr …; NAME/FIGURE of a later verification.")
    ] = "accuracy",
    uri: Annotated[str, typer.Option(parser=expand_home, help="MLflow's tracking URI.")] = "sqlite:///runs/mlflow.db",
    experiment: Annotated[str, typer.Option(help="Experiment in MLflow.")] = "bigface",
    query: Annotated[
        str, typer.Option("--filter", help="Filter of MLflow, such as \"params.`net.width` = '16'\".")
    ] = "",
    predict: Annotated[
        str | None,
        typer.Option(help="Parameters to predict for, such as 600M or 1.2e9; default: twice the largest run's."),
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=output, help="PNG file for runs, law and prediction.")] = None,
    json: Json = None,
) -> None:
    """Fit the error of finished runs as a power law of their parameters, and predict the next size."""
    from pipelines.experiments.scaling import findings, run_table, scaling_figure, scaling_figures
    from pipelines.experiments.scaling import scaling as run

    found = run(runs or [], figure, uri, experiment, query, predict)
    show_table(run_table(found), figure)
    for name, reason in found.left_out:
        show_line(f"left out: {name}: {reason}", "yellow")
    for finding in findings(found):
        show_line(finding)
    if out:
        with explain_disk_errors(out):
            scaling_figure(found, figure).savefig(out, format="png")
    show("scaling", scaling_figures(found), json, runs=[asdict(run) for run in found.runs], left_out=found.left_out)


@app.command(rich_help_panel="Training")
def runs(
    folder: Annotated[
        Path | None, typer.Argument(parser=local, help="Folder of runs; default: runs, or none with --uri.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(parser=expand_home, help="MLflow's tracking URI; default: FOLDER/mlflow.db.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Experiment in MLflow; default: all.")] = None,
    query: Annotated[
        str, typer.Option("--filter", help="Filter of MLflow, such as \"params.`method.kind` = 'attfc'\".")
    ] = "",
    sort: Annotated[
        str, typer.Option(help="Order: started, name, or a figure such as accuracy, best first.")
    ] = "started",
    limit: Annotated[
        int, typer.Option(min=1, help="Runs shown, without the children of searches and comparisons.")
    ] = 20,
    json: Json = None,
) -> None:
    """List runs with their scores, newest first; runs of comparisons and searches stand below them."""
    from pipelines.experiments.runs import COLUMNS, run_facts, run_table
    from pipelines.experiments.runs import runs as find

    trees = find(folder or (None if uri else Path("runs")), uri, experiment, query, sort, limit)
    show_lines(run_table(trees), COLUMNS)
    facts = run_facts(trees)
    states = Counter(fact["state"].lower() for fact in facts)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    typer.echo(f"{count_of(len(facts), 'run')}: {counts}", err=True)  # a pipe gets the runs alone
    write_json("runs", {"runs": len(facts), **states}, json, runs=facts)
