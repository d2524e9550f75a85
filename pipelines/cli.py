"""The ``bigface`` command. Exit codes: 0 done, 2 the user's mistake (one line), 1 anything else."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fr_core.config import distillation, load_config, recipes
from fr_core.data.schema import Layout
from fr_core.data.store import to_path
from fr_core.errors import UserError
from pipelines.unpack import Form

if TYPE_CHECKING:
    from pipelines.verify import Result

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()


def local(ref: str | Path) -> Path:
    """Of what is written here and not at a URL."""
    if "://" in str(ref):
        raise UserError(f"{ref}: this can only lie on a local disk")
    return Path(ref)


VERIFY_FILES = ("roc.png", "det.png", "scores.png", "results.md")
Json = Annotated[Path | None, typer.Option("--json", parser=local, help="Write the figures to this JSON file.")]
NetName = Annotated[str | None, typer.Option("--net", help="For bare weights: mobilefacenet or iresnetDEPTH.")]
Model = Annotated[str, typer.Option(help="A run, a checkpoint, or weights.safetensors with --net.")]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value …", show_default=False)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(parser=local, help="Folder of the run.")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(min=1)] = 2,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Synthetic faces → shards → Ray Data → Ray Train → verification on unseen identities, in about five minutes."""
    from pipelines.demo import demo as run

    show("demo", run(out, workers, "demo", overrides or [], console.print), json)
    console.print(f"report: {out / 'report.json'}   pictures: {out / 'pictures'}", markup=False)


@app.command()
def synth(
    out: Annotated[Path, typer.Option(parser=local, help="Folder for images/, landmarks.csv and pairs.csv.")],
    identities: Annotated[int, typer.Option(min=1)] = 200,
    shots: Annotated[int, typer.Option(min=1, help="Images per identity.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int, typer.Option(min=16, help="Pixels.")] = 112,
    first_identity: Annotated[int, typer.Option(min=0, help="Another range: other people.")] = 0,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of each kind per fold in pairs.csv; 0: none.")] = 0,
    json: Json = None,
) -> None:
    """Draw procedural faces: identities with landmarks, pose, expression, light and other nuisances."""
    from fr_core.data.synthetic import write_faces
    from fr_core.verify.pairs import write_pairs

    started = time.monotonic()
    with bar("synth", identities * shots) as advance, writable(out):
        images = write_faces(out, identities, shots, seed, size, first_identity=first_identity, progress=advance)
        if pairs:
            write_pairs(out, pairs, seed)
    show("synth", {"images": images, "images_per_second": images / (time.monotonic() - started)}, json)


@app.command()
def ingest(
    src: Annotated[
        str, typer.Argument(help="Folder of IDENTITY/photo.jpg or .png; .rec, .zip, .tar; a list of files; or a URL.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the shards, or a URL: s3://BUCKET/FOLDER.")],
    layout: Annotated[Layout, typer.Option(help="flat, or grouped by identity.")] = "flat",
    landmarks: Annotated[
        str | None,
        typer.Option(help="CSV of 5 points per image, or 68, to align by: path,left_eye_x … or path,x_0 …."),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Find the face in each photo and align it; needs bigface\\[align].")
    ] = False,
    labels: Annotated[str | None, typer.Option(help="List of 'path identity', for a folder of loose images.")] = None,
    size: Annotated[int, typer.Option(min=16, help="Pixels of the crops.")] = 112,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Turn a folder of faces into Parquet shards with a manifest; what cannot be used is listed in rejects.csv."""
    from pipelines.ingest import ingest as run

    started = time.monotonic()
    with bar("ingest", None) as advance:
        manifest = run(
            src, out, layout, size, landmarks, labels, overwrite, not in_process, align=align, progress=growing(advance)
        )
    rejected, listed = sum(manifest.rejects.values()), escape(str(to_path(out) / "rejects.csv"))
    for reason, count in manifest.rejects.items():
        console.print(f"[yellow]left out: {count} images, {reason}; listed in {listed}[/]")
    if "not_square" in manifest.warnings:
        console.print(
            f"[bold red]warning: {manifest.warnings['not_square']} images are no square crops; their centres were "
            "taken for faces. Aligned crops, --landmarks or --align recognise far better.[/]"
        )
    if "identities_without_images" in manifest.warnings:
        count = manifest.warnings["identities_without_images"]
        console.print(f"[yellow]warning: {count} identities have no usable image[/]")
    figures = {
        "images": manifest.images,
        "identities": manifest.identities,
        "shards": len(manifest.shards),
        "rejected": rejected,
        "not_square": manifest.warnings.get("not_square", 0),
        "images_per_second": manifest.images / (time.monotonic() - started),
    }
    show("ingest", figures, json)


@app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them; a folder or a URL.")],
    out: Annotated[
        Path | None, typer.Option(parser=local, help="Folder for a histogram, a contact sheet and findings.csv.")
    ] = None,
    json: Json = None,
) -> None:
    """Say what is in a dataset: sizes of identities, faces, damaged images, images that are there twice."""
    from pipelines.inspect import inspect as run

    with bar("inspect", None) as advance, writable(out or Path()):
        figures = run(shards, out, growing(advance))
    show("inspect", figures, json)


@app.command()
def unpack(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them; a folder or a URL.")],
    out: Annotated[Path, typer.Option(parser=local, help="An empty or new folder.")],
    form: Annotated[Form, typer.Option("--as", help="folders, one a person, or webdataset tars.")] = "folders",
    json: Json = None,
) -> None:
    """Turn shards back into images, JPEG bytes untouched."""
    from pipelines.unpack import unpack as run

    with bar("unpack", None) as advance, writable(out):
        images = run(shards, out, form, growing(advance))
    show("unpack", {"images": images}, json)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    data: Annotated[str, typer.Option(help="Shards, as bigface ingest leaves them.")],
    out: Annotated[Path, typer.Option(parser=local, help="Folder for Parquet files of sample_id, label, embedding.")],
    net: NetName = None,
    flip: Annotated[bool, typer.Option(help="Add the mirrored image's embedding, as the protocols do.")] = True,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Embed every image of a dataset; begun again, it goes on where it was stopped."""
    from pipelines.embed import embed as run

    started = time.monotonic()
    with bar("embed", None) as advance, writable(out):
        facts = run(model, to_path(data), out, net, flip, not in_process, overwrite, progress=growing(advance)).facts
    seconds = time.monotonic() - started
    show("embed", {"images": facts.images, "embedding": facts.embedding, "seconds": seconds}, json)


@app.command()
def clean(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them.")],
    model: Model,
    out: Annotated[Path, typer.Option(parser=local, help="Folder for clean.csv, a picture, and the embeddings.")],
    net: NetName = None,
    outlier: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to the rest of its identity.")] = 0.2,
    flip: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to another identity's centre.")] = 0.4,
    copy: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to an earlier image of its own.")] = 0.98,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """List flipped labels, outliers and copies, by the embeddings of a good net; nothing is deleted."""
    from pipelines.clean import Limits
    from pipelines.clean import clean as run

    with bar("embed", None) as advance, writable(out):
        limits = Limits(outlier, flip, copy)
        figures = run(to_path(shards), model, out, net, limits, not in_process, growing(advance))
    show("clean", figures, json)
    command = shlex.join(["bigface", "merge", shards, "--without", str(out / "clean.csv"), "--out", "NEW"])
    console.print(f"leave them out: {command}", markup=False, soft_wrap=True)


@app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(help="As bigface ingest leaves them, all flat or all grouped.")],
    out: Annotated[Path, typer.Option(parser=local, help="Folder for the new shards.")],
    same_names: Annotated[bool, typer.Option("--same-names", help="Identities called alike are one person.")] = False,
    model: Annotated[str | None, typer.Option(help="A good net: identities that look alike are one person.")] = None,
    net: NetName = None,
    overlap: Annotated[float, typer.Option(min=-1, max=1, help="Cosine of centres that makes them one.")] = 0.7,
    without: Annotated[
        Path | None, typer.Option(parser=local, help="List of sample_id to leave out of one dataset.")
    ] = None,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Make one dataset of several, or of one without the images of a list; identity_map.csv tells who became whom."""
    from pipelines.merge import merge as run

    with bar("merge", None) as advance, writable(out):
        figures = run(
            list(map(to_path, datasets)),
            out,
            same_names,
            model,
            net,
            overlap,
            without,
            not in_process,
            progress=growing(advance),
        )
    show("merge", figures, json)


@app.command()
def split(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them.")],
    out: Annotated[Path, typer.Option(parser=local, help="Folder for train/ (shards), verify/ (images, pairs.csv).")],
    share: Annotated[float, typer.Option(min=0, max=0.5, help="Of the identities, held out.")] = 0.1,
    pairs: Annotated[int, typer.Option(min=1, help="Of each kind per fold.")] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = None,
) -> None:
    """Hold identities out of a dataset to verify on."""
    from pipelines.merge import split as run

    with bar("split", None) as advance, writable(out):
        figures = run(to_path(shards), out, share, pairs, seed, growing(advance))
    show("split", figures, json)


RunFolder = Annotated[str | None, typer.Option("--out", help="Folder of the run, or a URL; default runs/RECIPE-DATE.")]
Workers = Annotated[int, typer.Option(min=1, help="Ray Train workers.")]
OneWorker = Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]


@app.command()
def mask(
    src: Annotated[Path, typer.Argument(parser=local, help="Folder of aligned crops, at any depth.")],
    out: Annotated[Path, typer.Option(parser=local, help="An empty or new folder.")],
    pairs: Annotated[
        Path | None, typer.Option(parser=local, help="Mask what these pairs name; makes a suite for verify.")
    ] = None,
    landmarks: Annotated[Path | None, typer.Option(parser=local, help="CSV of 5 or 68 points per image.")] = None,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Of the images; with --pairs all.")] = 1.0,
    rendered: Annotated[float, typer.Option(min=0, max=1, help="Of the masks by the 3D tool.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = None,
) -> None:
    """Put synthetic masks on faces: copies of a folder, or verification sets masked against plain."""
    from fr_core.config import Masks
    from pipelines.mask import mask as run

    with bar("mask", None) as advance, writable(out):
        figures = run(src, out, Masks(ratio=ratio, rendered=rendered), landmarks, pairs, seed, growing(advance))
    if figures["rejected"]:
        listed = escape(str(out / "rejects.csv"))
        console.print(f"[yellow]left out: {figures['rejected']} images; listed in {listed}[/]")
    show("mask", figures, json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    overrides: Overrides = None,
    out: RunFolder = None,
    workers: Workers = 1,
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


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help="A run, a checkpoint, or weights.safetensors.")] = None,
    teacher_net: Annotated[str | None, typer.Option(help="For bare weights: mobilefacenet or iresnetDEPTH.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Instead of --teacher: what bigface embed made of it.")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="More flat shards, whose labels are not looked at.")] = None,
    out: RunFolder = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Train a recipe that also follows a teacher; the options are its method.distill, and key.path=value the rest."""
    options = {"teacher": teacher, "teacher_net": teacher_net, "embeddings": embeddings, "unlabelled.path": unlabelled}
    given = [*(overrides or []), *(f"method.distill.{name}={value}" for name, value in options.items() if value)]
    if (method := load_config(recipe).method).kind != "bigface":
        raise UserError(f"{recipe}: only bigface, the method with a class matrix, distils, not {method.kind}")
    if distillation(load_config(recipe, given)) is None:
        raise UserError("nobody to learn from: give --teacher REF, or --embeddings DIR")
    train(recipe, given, out, workers, in_process, resume, overwrite, json)


@app.command()
def verify(
    ckpt: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    pairs: Annotated[
        Path | None, typer.Option(help="CSV image_a,image_b,same[,fold], LFW's pairs.txt, or a .bin.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pairs' images; a .bin brings its own.")] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Folder of sets instead: NAME.bin, or NAME/pairs.csv or .txt with images.")
    ] = None,
    ijb: Annotated[Path | None, typer.Option(help="IJB-B or IJB-C instead: meta/ and loose_crop/.")] = None,
    mfr: Annotated[
        Path | None, typer.Option(parser=local, help="Masked faces: masked/NAME/*, standard/NAME/*.")
    ] = None,
    net: NetName = None,
    out: Annotated[
        Path | None, typer.Option(parser=local, help="Folder for ROC, DET and score pictures, and results.md.")
    ] = None,
    json: Json = None,
) -> None:
    """Score a net on pairs of faces, with 95 % intervals, or on templates: accuracy, TAR@FAR, ROC, DET, 1:N."""
    from fr_core.nets.open import open_net
    from fr_core.train.tracking import log_verification
    from pipelines.verify import verify as run
    from pipelines.verify import verify_suite
    from pipelines.verify_mfr import mfr_figures, verify_mfr
    from pipelines.verify_templates import template_figures, verify_templates

    given = pairs or suite or ijb or mfr
    if given is None or sum(map(bool, (pairs, suite, ijb, mfr))) > 1:
        raise UserError("give one of --pairs (with --images unless it is a .bin), --suite, --ijb and --mfr")
    recogniser = open_net(ckpt, net)
    with bar("embed", None) as advance, writable(out or Path()):
        if mfr:
            masked = verify_mfr(recogniser, mfr, advance)
            figures, missing = mfr_figures(masked), masked.failed
            if masked.score is None:
                console.print("[yellow]too few pairs of two people for an FMR of 1e-5: no MFR score[/]")
        elif ijb:
            templates = verify_templates(recogniser, ijb, out, advance)
            figures, missing = template_figures(templates), templates.failed
        else:

            def embed(pixels: np.ndarray) -> np.ndarray:
                return recogniser.embed(pixels, progress=advance)

            results = verify_suite(embed, given, out) if suite else {"": run(embed, images, given, out, str(ckpt))}
            figures, missing = pair_figures(results, out if suite else None)
    show("verify", figures, json, missing=missing)
    made = [out / file for file in VERIFY_FILES if (out / file).is_file()] if out and not mfr else []
    try:
        run_id = log_verification(to_path(ckpt), given.stem, figures, made)
        if run_id:
            console.print(f"added to the MLflow run {run_id} that trained this net")
    except UserError as error:
        console.print(f"[yellow]{escape(str(error))}[/]")


def pair_figures(results: "Mapping[str, Result]", out: Path | None) -> tuple[dict[str, float], dict[str, str]]:
    """Prints a table of several sets, and what was left out; the figures of all, and image -> why it was left out.

    Args:
        out: folder for the table as ``results.md``.
    """
    from fr_core.verify.report import markdown, verification_figures
    from pipelines.verify import suite_table

    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, result in results.items():
        prefix = f"{name}_" if name else ""
        figures |= verification_figures(result.verification, prefix)
        figures |= {f"{prefix}missing_images": len(result.failed), f"{prefix}skipped_pairs": result.skipped}
        missing |= {f"{name}/{path}" if name else path: reason for path, reason in result.failed.items()}
        for path, reason in sorted(result.failed.items()):
            console.print(f"[yellow]{escape(path)}: {reason}[/]")
        if result.failed:
            console.print(f"[bold red]{name} {len(result.failed)} images unusable, {result.skipped} pairs left out[/]")
    if "" not in results:
        table = suite_table(results)
        if out:
            (out / "results.md").write_text(markdown(table) + "\n")
        show_table(table)
    return figures, missing


@app.command()
def export(
    ckpt: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    out: Annotated[Path, typer.Option(parser=local, help="FILE.onnx; weights beyond 1.5 GiB lie beside it.")],
    net: NetName = None,
    json: Json = None,
) -> None:
    """Fold a net's batch norm and write it as ONNX, compared with the net; needs bigface\\[export]."""
    from pipelines.export import export as run

    with writable(out):
        figures = run(ckpt, out, net)
    show("export", figures, json)
    console.print(f"ONNX Runtime's embeddings are within {figures['max_difference']:.1e} of the net's")
    console.print(f"use it: bigface match A.jpg B.jpg --model {out}", markup=False)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    identities: Annotated[int, typer.Option(min=1, help="Of the training set.")],
    gpus: Annotated[int, typer.Option(min=1, help="Workers, one card each.")] = 1,
    gpu_gib: Annotated[float, typer.Option("--gpu-gib", min=0.1, help="Memory of one card.")] = 24.0,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Say before a run whether it fits the card: memory by part, per head and mode, and the first knob to turn."""
    from pipelines.plan import plan as run

    console.print(
        f"{recipe}, {identities:,} identities, {gpus} × {gpu_gib:g} GiB. Computed, not yet checked on a card."
    )
    rows, advice, figures = run(load_config(recipe, overrides or []), identities, gpus, gpu_gib)
    show_table(rows, "GiB per card")
    console.print(advice)
    show("plan", figures, json)


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="CSV of step, loss or of last_step, mean_loss.")],
    form: Annotated[str, typer.Option(help="recurrence or haar.")] = "recurrence",
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of the schedule; again for more.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Global batch of the log.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Base rate; default: the log's first, else 0.1.")] = None,
    picture: Annotated[Path, typer.Option(parser=local, help="PNG of loss, detector and rate.")] = Path("replay.png"),
    json: Json = None,
) -> None:
    """Tell what FastFace would have done on a past loss log."""
    from pipelines.replay import replay as run

    changes, steps, figure = run(log, form, set_ or [], batch, lr)
    table = Table("step", "factor", "rate", title=f"{form} on {steps:,} steps")
    for change in changes:
        table.add_row(f"{change['step']:,}", f"{change['factor']:g}", f"{change['rate']:.6g}")
    console.print(table)
    with writable(picture):
        figure.savefig(picture)
    console.print(f"picture: {picture}", markup=False)
    show("replay", {"steps": steps, "changes": len(changes)}, json, changes=changes)


@app.command()
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
    out: Annotated[Path | None, typer.Option(parser=local, help="PNG of runs, law and prediction.")] = None,
    json: Json = None,
) -> None:
    """Fit error as a power law of parameters over finished runs, and predict the next size."""
    from pipelines.scaling import findings, run_table, scaling_figure, scaling_figures
    from pipelines.scaling import scaling as run

    found = run(runs or [], figure, uri, experiment, query, predict)
    show_table(run_table(found), figure)
    for name, reason in found.left_out:
        console.print(f"[yellow]left out: {escape(name)}: {escape(reason)}[/]")
    for finding in findings(found):
        console.print(finding)
    if out:
        with writable(out):
            scaling_figure(found, figure).savefig(out, format="png")
    show("scaling", scaling_figures(found), json, runs=[asdict(run) for run in found.runs], left_out=found.left_out)


comparisons = typer.Typer(no_args_is_help=True, help="Settings compared on the same data, net and seeds; resumable.")
app.add_typer(comparisons, name="compare")


Results = Annotated[Path, typer.Option(parser=local, help="CSV that finished runs are appended to.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each setting.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin no run later than this.")]


@comparisons.command("schedules")
def compare_schedules(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    epochs: Annotated[int, typer.Option(min=1, help="Of the recipe's own schedule.")],
    fast_epochs: Annotated[int, typer.Option(min=1, help="Of FastFace and of cosine beside it.")],
    results: Results,
    seeds: Seeds = 3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of FastFace; again for more.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    in_process: Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")] = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """The recipe in full, against FastFace and cosine in fewer epochs: accuracy and time over seeds."""
    from pipelines.compare import schedules

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
    in_process: Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")] = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """FC, Partial FC, Virtual FC, DCQ, F2C and AttFC as in AttFC's tables, with the paper's figures beside."""
    from fr_core.config import classes, total_steps
    from fr_core.data.schema import open_dataset
    from fr_core.data.stream import make_plan
    from pipelines.compare import PUBLISHED, heads

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
    by_table = heads(config, steps, classes(config, one.identities), flat, grouped, centres, scale, momentum)
    settings = {k: v for title, group in by_table.items() if title[0] in tables for k, v in group.items()}
    columns = ("accuracy", "tar_at_far_1e-2", "tar_at_far_1e-3", "peak_memory_mib", "images_per_second", "classes_mib")
    given = (recipe, settings, overrides, seeds, results, workers, in_process, minutes, columns, json)
    compared("heads", *given, published=PUBLISHED)


@comparisons.command("settings")
def compare_settings(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")],
    results: Results,
    setting: Annotated[list[str] | None, typer.Option(help="'NAME: key.path=value …'; again for more.")] = None,
    suite: Annotated[
        Path | None, typer.Option(parser=local, help="Folder of sets; every run is verified on each.")
    ] = None,
    seeds: Seeds = 1,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    in_process: Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")] = False,
    minutes: Minutes = 40,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Any settings of a recipe against each other."""
    from pipelines.compare import named_settings, suite_columns

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
    from pipelines.compare import compare, summary

    with writable(results):
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


bench = typer.Typer(no_args_is_help=True, help="Speed and memory against plain references, in one run.")
app.add_typer(bench, name="bench")


@bench.command("head")
def bench_head(
    identities: Annotated[int, typer.Option(min=1000)] = 200_000,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    embedding: Annotated[int, typer.Option(min=2)] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    million: Annotated[bool, typer.Option(help="Also a million identities in one process.")] = True,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    json: Json = None,
) -> None:
    """The classifier's step: streamed and fused, against plain PyTorch and against its matrix products alone."""
    from pipelines.bench import bench_head as run

    show("bench head", run(identities, batch, embedding, repeats, threads, million, emulated, console.log), json)


@bench.command("attfc")
def bench_attfc(
    slots: Annotated[int, typer.Option(min=1000)] = 300_000,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    embedding: Annotated[int, typer.Option(min=2)] = 512,
    identities: Annotated[int, typer.Option(min=1)] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    flat: Annotated[str | None, typer.Option(help="Flat shards, to measure the data path too.")] = None,
    grouped: Annotated[str | None, typer.Option(help="The same images as grouped shards.")] = None,
    json: Json = None,
) -> None:
    """AttFC's loss and queue: streamed, against the usual formulation; and class images from grouped shards."""
    from pipelines.bench import bench_attfc as run
    from pipelines.bench import bench_grouped

    figures = run(slots, batch, embedding, identities, repeats, threads, emulated, console.log)
    if (flat is None) != (grouped is None):
        raise UserError("the data path needs both --flat and --grouped")
    if flat and grouped:
        figures |= bench_grouped(flat, grouped, 4)
    show("bench attfc", figures, json)


@bench.command("memory")
def bench_memory(
    depth: Annotated[int, typer.Option(help="Of an IR-ResNet.")] = 100,
    width: Annotated[int, typer.Option(min=4)] = 16,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 64,
    batch: Annotated[int, typer.Option(min=16, help="Global; a multiple of 16.")] = 32,
    identities: Annotated[int, typer.Option(min=1000)] = 50_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json: Json = None,
) -> None:
    """A training step's peak memory and time under each switch that trades one for the other."""
    from pipelines.bench_memory import bench_memory as run

    rows, figures = run(depth, width, size, batch, identities, repeats, threads, console.log)
    show_table(rows, "Memory above the bare process, of rank 0")
    show("bench memory", figures, json)


@bench.command("ingest")
def bench_ingest(
    images: Annotated[int, typer.Option(min=1000)] = 200_000,
    folder: Annotated[Path, typer.Option(parser=local, help="Scratch for archives and shards.")] = Path("bench_ingest"),
    json: Json = None,
) -> None:
    """Tar and RecordIO to shards: images a second, and memory on a tenth of the images and on all."""
    from pipelines.bench import bench_ingest as run

    with writable(folder):
        show("bench ingest", run(images, folder, console.log), json)


@bench.command("masks")
def bench_masks(
    images: Annotated[int, typer.Option(min=100, help="A turn; figures are medians of three.")] = 3000,
    json: Json = None,
) -> None:
    """Masks a second on one core, by both tools, against a plain 2D one."""
    from pipelines.bench import bench_masks as run

    show("bench masks", run(images), json)


@bench.command("schedule")
def bench_schedule(
    steps: Annotated[int, typer.Option(min=1000)] = 200_000,
    json: Json = None,
) -> None:
    """FastFace's time per step, against a window that is summed anew each step."""
    from pipelines.bench import bench_schedule as run

    show("bench schedule", run(steps), json)


@bench.command("latency")
def bench_latency(
    model: Annotated[str | None, typer.Option(help="One net instead of all depths: as for verify.")] = None,
    net: NetName = None,
    budget_ms: Annotated[float, typer.Option(min=0, help="For an answer: FRUITS-1000's.")] = 1000.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns; figures are their medians.")] = 7,
    json: Json = None,
) -> None:
    """One face on one core: nets as they train, with batch norm folded, and in ONNX Runtime; which fit a budget."""
    from pipelines.latency import bench_latency as run
    from pipelines.latency import table

    rows, figures = run(model, net, budget_ms, repeats, console.log)
    show_table(table(rows), "one thread, one image; an answer is decoding, alignment and the fastest form")
    show("bench latency", figures, json, rows=rows)


@app.command()
def match(
    a: Annotated[Path, typer.Argument(help="A face crop.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    model: Annotated[str, typer.Option(help="A run, a checkpoint, or weights.safetensors with --net.")],
    net: NetName = None,
    json: Json = None,
) -> None:
    """Compare two faces."""
    from fr_core.nets.open import open_net
    from pipelines.verify import similarity

    recogniser = open_net(model, net)
    cosine, odd = similarity(recogniser.embed, a, b)
    for path in odd:
        console.print(f"[bold red]warning: {escape(str(path))} is no square crop; its centre was taken for the face[/]")
    figures = {"cosine": cosine}
    if recogniser.threshold is not None:
        figures["threshold"] = recogniser.threshold
        console.print("same person" if cosine >= recogniser.threshold else "different people")
    show("match", figures, json)


def show(command: str, figures: Mapping[str, float], json: Path | None, **more: object) -> None:
    """Prints figures as a table and writes the same as JSON where asked."""
    table = Table("figure", "value", title=command)
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.4f}"
        table.add_row(name, text)
    console.print(table)
    if json:
        from fr_core.verify.report import report, write_report

        with writable(json):
            write_report(json, report(command, figures, **more))


def show_table(rows: list[tuple[str, ...]], title: str | None = None) -> None:
    """Prints a table, header first."""
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def growing(advance: Callable[..., None]) -> Callable[[int, int], None]:
    """For a bar that is told how many there are so far, and in all."""
    done = 0

    def progress(images: int, total: int) -> None:
        nonlocal done
        advance(images - done, total)
        done = images

    return progress


@contextmanager
def bar(name: str, total: int | None) -> Iterator:
    """A progress bar; yields ``advance(count, total=None)``."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)

        def advance(count: int, total: int | None = None) -> None:
            progress.update(task, advance=count, total=total)

        yield advance


@contextmanager
def writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}") from None


def main() -> None:
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[red]bigface:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
