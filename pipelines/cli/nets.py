"""Commands on trained nets."""

import time
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.markup import escape

from fr_core.data.store import explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import (
    NET,
    Json,
    NetName,
    OneWorker,
    Overrides,
    Overwrite,
    Resume,
    Workers,
    any_output,
    local,
    output,
)
from pipelines.cli.output import bar, console, show, show_table

if TYPE_CHECKING:
    from fr_core.verify.suites import Result


KERNELS = (
    "opened elsewhere: on CPUs without VNNI, ONNX Runtime's fastest kernels clip 8-bit weights' sums; set the session "
    "option session.x64quantprecision=1 there (bigface does), or use --weights 7"
)
CENTRE = "the centre was taken for the face"
VERIFY_FILES = ("roc.png", "det.png", "scores.png", "results.md")


@app.command(rich_help_panel="Trained nets")
def verify(
    ckpt: Annotated[str, typer.Argument(help=NET)],
    pairs: Annotated[
        Path | None, typer.Option(help="CSV image_a,image_b,same[,fold], LFW's pairs.txt, or a .bin.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pairs' images; a .bin brings its own.")] = None,
    suite: Annotated[
        Path | None,
        typer.Option(help="Folder of sets instead: NAME.bin, NAME.csv, NAME/pairs.csv or .txt with images."),
    ] = None,
    ijb: Annotated[Path | None, typer.Option(help="IJB-B or IJB-C instead: meta/ and loose_crop/.")] = None,
    mfr: Annotated[
        Path | None, typer.Option(parser=local, help="Masked faces: masked/NAME/*, standard/NAME/*.")
    ] = None,
    net: NetName = None,
    out: Annotated[
        Path | None, typer.Option(parser=output, help="Folder for ROC, DET and score pictures, and results.md.")
    ] = None,
    json: Json = None,
) -> None:
    """Score a net on pairs of faces, with 95 % intervals, or on templates: accuracy, TAR@FAR, ROC, DET, 1:N."""
    from fr_core.nets.open import open_net
    from fr_core.train.mlflow_runs import log_verification
    from fr_core.verify.suites import verify as run
    from fr_core.verify.suites import verify_suite
    from pipelines.nets.verify_mfr import mfr_figures, verify_mfr
    from pipelines.nets.verify_templates import template_figures, verify_templates

    given = pairs or suite or ijb or mfr
    if given is None or sum(map(bool, (pairs, suite, ijb, mfr))) > 1:
        raise UserError("give one of --pairs (with --images unless it is a .bin), --suite, --ijb and --mfr")
    recogniser = open_net(ckpt, net)
    with bar("embed", None) as advance, explain_disk_errors(out or Path()):
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

            size = recogniser.net.input_size
            if suite:
                results = verify_suite(embed, suite, size, out)
            else:
                results = {"": run(embed, images, given, size, out, str(ckpt))}
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
    from fr_core.verify.suites import suite_table

    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, result in results.items():
        prefix = f"{name}_" if name else ""
        figures |= verification_figures(result.verification, prefix)
        figures |= {f"{prefix}missing_images": len(result.failed), f"{prefix}skipped_pairs": result.skipped}
        missing |= {f"{name}/{path}" if name else path: reason for path, reason in result.failed.items()}
        for path, reason in sorted(result.failed.items()):
            console.print(f"[yellow]{escape(path)}: {reason}[/]")
        if result.not_square:
            console.print(f"[bold red]warning: {name} {len(result.not_square)} images are no square crops; {CENTRE}[/]")
        if result.failed:
            console.print(f"[bold red]{name} {len(result.failed)} images unusable, {result.skipped} pairs left out[/]")
    if "" not in results:
        table = suite_table(results)
        if out:
            (out / "results.md").write_text(markdown(table) + "\n")
        show_table(table)
    return figures, missing


@app.command(rich_help_panel="Trained nets")
def match(
    a: Annotated[Path, typer.Argument(help="A face crop.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    model: Annotated[str, typer.Option(help=NET)],
    net: NetName = None,
    json: Json = None,
) -> None:
    """Compare two faces."""
    from fr_core.nets.open import open_net
    from fr_core.verify.suites import similarity

    recogniser = open_net(model, net)
    cosine, odd = similarity(recogniser, a, b)
    for path in odd:
        console.print(f"[bold red]warning: {escape(str(path))} is no square crop; {CENTRE}[/]")
    figures = {"cosine": cosine}
    if recogniser.threshold is not None:
        figures["threshold"] = recogniser.threshold
        console.print("same person" if cosine >= recogniser.threshold else "different people")
    show("match", figures, json)


@app.command(rich_help_panel="Trained nets")
def export(
    ckpt: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    out: Annotated[Path, typer.Option(parser=output, help="FILE.onnx; weights beyond 1.5 GiB lie beside it.")],
    net: NetName = None,
    json: Json = None,
) -> None:
    """Fold a net's batch norm and write it as ONNX, compared with the net; needs bigface\\[export]."""
    from pipelines.nets.export import export as run

    with explain_disk_errors(out):
        figures = run(ckpt, out, net)
    show("export", figures, json)
    console.print(f"ONNX Runtime's embeddings are within {figures['max_difference']:.1e} of the net's")
    console.print(f"use it: bigface match A.jpg B.jpg --model {out}", markup=False)


@app.command(rich_help_panel="Trained nets")
def prune(
    ckpt: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    out: Annotated[str, typer.Option(parser=any_output, help="FILE.safetensors; with --data the folder of the run.")],
    overrides: Overrides = None,
    ratio: Annotated[
        str, typer.Option(help="Share of the channels to drop, or one for each stage: .1,.2,.2,.3.")
    ] = "0.2",
    round_to: Annotated[int, typer.Option(min=1, help="Keep multiples of this many channels; 8 is fast.")] = 1,
    importance: Annotated[str, typer.Option(help="Of channels: weights by l1 or l2, or bn, gains of norms.")] = "l1",
    data: Annotated[str | None, typer.Option(help="Shards to fine-tune on, with the whole net as teacher.")] = None,
    recipe: Annotated[str, typer.Option(help="Of the fine-tuning.")] = "prune_sp02",
    images: Annotated[Path | None, typer.Option(help="Verify before and after: folder of the pairs' images.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="The pairs, as bigface verify takes them.")] = None,
    net: NetName = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Drop a net's least important channels, and fine-tune what is left; needs bigface\\[compress]."""
    from pipelines.nets.prune import flat, prune_and_tune, table
    from pipelines.nets.prune import prune as run

    try:
        ratios = [float(share) for share in ratio.split(",")]
    except ValueError:
        raise UserError(f"--ratio {ratio}: give a number, or one for each stage, such as 0.1,0.2,0.2,0.3") from None
    what = (ckpt, to_path(out), ratios)
    with explain_disk_errors(Path(out)):
        if data:
            options = {"data.path": data, "verify.images": images and str(images), "verify.pairs": pairs and str(pairs)}
            given = [*(overrides or []), *(f"{name}={dumps(value)}" for name, value in options.items() if value)]
            found = prune_and_tune(
                *what, recipe, given, round_to, importance, net, workers, in_process, resume, overwrite
            )
        elif overrides or workers > 1 or in_process or resume or overwrite:
            raise UserError("these are options of a fine-tuning: give --data SHARDS, or leave them out")
        else:
            found = run(*what, round_to, importance, net, images, pairs)
    show_table(table(found), "prune")
    show("prune", flat(found), json)
    console.print(f"use it: bigface verify {out} …", markup=False)


@app.command(rich_help_panel="Trained nets")
def quantize(
    ckpt: Annotated[str, typer.Argument(help="A run, a checkpoint, or weights.safetensors with --net.")],
    data: Annotated[str, typer.Option(help="Flat shards; some 14,000 faces are enough.")],
    overrides: Overrides = None,
    weights: Annotated[int | None, typer.Option(min=2, max=8, help="Bits; default: the recipe's.")] = None,
    activations: Annotated[int | None, typer.Option(min=2, max=8, help="Bits; default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(parser=output, help="FILE.onnx, in integers.")] = None,
    net: NetName = None,
    recipe: Annotated[str, typer.Option(help="quantize_ekd, quantize_mse, or a TOML file.")] = "quantize_ekd",
    data_share: Annotated[float, typer.Option(help="Of one epoch, such as 0.25.")] = 1.0,
    calibrate_only: Annotated[bool, typer.Option("--calibrate-only", help="No training: set ranges alone.")] = False,
    images: Annotated[Path | None, typer.Option(help="Verify before and after: folder of the pairs' images.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="The pairs, as bigface verify takes them.")] = None,
    run: Annotated[str | None, typer.Option(help="Folder of the run; default runs/quantize_NAME-DATE.")] = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --run.")] = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Quantise a net in one epoch of few faces, and write it in integers; needs bigface\\[compress]."""
    from pipelines.nets.quantize import quantised_config, table
    from pipelines.nets.quantize import quantize as quantised

    if resume and run is None:
        raise UserError("--resume: name the run with --run")
    fields = {"data__path": data, "net__weights": weights, "net__activations": activations}
    verified = {"verify__images": images and str(images), "verify__pairs": pairs and str(pairs)}
    config = quantised_config(ckpt, recipe, net, data_share, calibrate_only, overrides or [], **fields, **verified)
    run = run or f"runs/quantize_{Path(ckpt).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    figures = quantised(config, to_path(run), out, workers, in_process, resume, overwrite)
    show("quantize", figures, json)
    show_table(table(figures))
    console.print(f"run: {run}   use it: bigface match A.jpg B.jpg --model {out or run}", markup=False)
    if out and getattr(config.net, "weights", 0) == 8:
        console.print(KERNELS, markup=False)
