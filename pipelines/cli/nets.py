"""Commands on trained nets."""

import shlex
import time
from collections.abc import Mapping
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from fr_core.data.resolve import resolve
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
    TrustCode,
    Workers,
    any_output,
    local,
    output,
)
from pipelines.cli.output import bar, command_line, show, show_line, show_table, write_json

if TYPE_CHECKING:
    from fr_core.nets.open import Recogniser
    from fr_core.nets.verifications import Verified
    from fr_core.verify.suites import Result

KERNELS = (
    "warning: on CPUs without VNNI, ONNX Runtime's fastest kernels clip the sums of 8-bit weights. Programs that open "
    "this file there set the session option session.x64quantprecision=1, as bigface does; or quantise with --weights 7"
)
FLOAT_NET = NET
PAIRS = "Pairs, as bigface verify takes them."
PAIRS_IMAGES = "Folder of the pairs' images, to verify before and after."
CENTRE = "the centre was taken for the face"
PHOTOS = ("A.jpg", "B.jpg")  # placeholders in commands to copy
SHOWN_IMAGES = 10  # left out of a verification, that are named
VERIFY_FILES = ("roc.png", "det.png", "scores.png", "results.md")


@app.command(rich_help_panel="Trained nets")
def verify(
    ckpt: Annotated[str, typer.Argument(help=NET)],
    pairs: Annotated[
        Path | None,
        typer.Option(parser=local, help="CSV image_a,image_b,same[,fold], LFW's pairs.txt, or a .bin file."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(parser=local, help="Folder of the pairs' images; a .bin file holds its own images.")
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(
            parser=local,
            help="Folder of sets, instead of --pairs: NAME.bin, NAME.csv, NAME/pairs.csv or .txt and images.",
        ),
    ] = None,
    ijb: Annotated[
        Path | None, typer.Option(parser=local, help="IJB-B or IJB-C, instead of --pairs: meta/ and loose_crop/.")
    ] = None,
    mfr: Annotated[
        Path | None,
        typer.Option(parser=local, help="Masked faces, instead of --pairs: masked/NAME/* and standard/NAME/*."),
    ] = None,
    net: NetName = None,
    out: Annotated[
        Path | None, typer.Option(parser=output, help="Folder for ROC, DET and score pictures, and results.md.")
    ] = None,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Score a net on pairs of faces or on templates: accuracy, TAR@FAR, ROC, DET, 1:N, with 95 % intervals."""
    from fr_core.nets.open import open_net
    from fr_core.verify.suites import verified, verify_suite
    from fr_core.verify.suites import verify as run
    from pipelines.nets.verify_mfr import mfr_figures, verify_mfr
    from pipelines.nets.verify_templates import template_figures, verify_templates

    source = pairs or suite or ijb or mfr
    if source is None or sum(map(bool, (pairs, suite, ijb, mfr))) > 1:
        raise UserError("give one of --pairs (with --images unless it is a .bin), --suite, --ijb and --mfr")
    recogniser = open_net(ckpt, net, trust_code=trust_code)
    show_pixels(ckpt, recogniser)
    results: dict[str, Result] = {}
    with bar("embed", None) as advance, explain_disk_errors(out or Path()):
        if mfr:
            masked = verify_mfr(recogniser, mfr, advance)
            figures, missing = mfr_figures(masked), masked.failed
            if masked.score is None:
                show_line("too few pairs of two people for an FMR of 1e-5: no MFR score", "yellow")
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
                results = {"": run(embed, images, source, size, out, str(ckpt))}
            figures, missing = pair_figures(results)
    if suite:
        show_suite(results, out)
        write_json("verify", figures, json, missing=missing)
    else:
        show("verify", figures, json, missing=missing)
    made = [out / file for file in VERIFY_FILES if (out / file).is_file()] if out and not mfr else []
    if made:
        show_line(f"files: {', '.join(map(str, made))}")
    log_to_mlflow(ckpt, source, figures, made)
    next_match = ["match", *(example_photos(results[""], images) if pairs else PHOTOS), "--model", ckpt]
    next_match += [*(["--net", net] if net else []), *(["--trust-code"] if trust_code else [])]
    if pairs and not store_verification(recogniser, verified(results[""], pairs)):
        next_match += ["--threshold", f"{figures['threshold']:.6g}"]
    if pairs and results[""].skipped:
        show_line("warning: the threshold is of incomplete pairs: mend the images and verify again", "yellow")
    show_line(f"next: {command_line(*next_match)}")


def show_pixels(ref: str, recogniser: "Recogniser") -> None:
    """Print whose net a file of another project was taken for, if it is one."""
    if recogniser.taken_for:
        show_line(f"{ref}: {recogniser.taken_for}")


def pair_figures(results: "Mapping[str, Result]") -> tuple[dict[str, float], dict[str, str]]:
    """Print what was left out of each set.

    Returns:
        The figures of all sets, and image -> why it was left out.
    """
    from fr_core.verify.pairs import odd_pairs
    from fr_core.verify.report import verification_figures

    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, result in results.items():
        prefix = f"{name}_" if name else ""
        figures |= verification_figures(result.verification, prefix)
        figures |= {f"{prefix}missing_images": len(result.failed), f"{prefix}skipped_pairs": result.skipped}
        missing |= {f"{name}/{path}" if name else path: reason for path, reason in result.failed.items()}
        for path, reason in sorted(result.failed.items())[:SHOWN_IMAGES]:
            show_line(f"{path}: {reason}", "yellow")
        if (more := len(result.failed) - SHOWN_IMAGES) > 0:
            show_line(f"… and {more:,} more; --json lists all", "yellow")
        of_set = f"{name}: " if name else ""
        for what, count in odd_pairs(result.pairs).items():
            show_line(f"warning: {of_set}{what}: {count:,}", "yellow")
        if result.not_square:
            show_line(f"warning: {of_set}{len(result.not_square)} images are no square crops; {CENTRE}", "bold red")
        if result.failed:
            unusable = f"{of_set}{len(result.failed)} images unusable, {result.skipped} pairs left out"
            show_line(unusable, "bold red")
    return figures, missing


def show_suite(results: "Mapping[str, Result]", out: Path | None) -> None:
    """Print the table of a suite; write it to ``results.md`` in ``out``."""
    from fr_core.verify.report import markdown
    from fr_core.verify.suites import suite_table

    table = suite_table(results)
    if out:
        with explain_disk_errors(out):
            (out / "results.md").write_text(markdown(table) + "\n")
    show_table(table, "verify")


def log_to_mlflow(ckpt: str, source: Path, figures: Mapping[str, float], files: list[Path]) -> None:
    """Add a verification to the MLflow run that trained the net, if there is one; print what happened."""
    from fr_core.train.mlflow_runs import log_verification

    if run_id := log_verification(to_path(ckpt), source.stem, figures, files):
        show_line(f"added to the MLflow run {run_id} that trained this net")


def store_verification(recogniser: "Recogniser", verified: "Verified") -> bool:
    """Store a verification in the folder of the net's run; print where, or why not. Return whether it is stored."""
    from fr_core.nets.verifications import add_verification

    try:
        path = recogniser.checkpoint and add_verification(recogniser.checkpoint, verified)
    except UserError as error:
        show_line(f"threshold not stored: {error}", "yellow")
        return False
    if not path:
        stored = recogniser.threshold
        kept = "" if stored is None else f"; match keeps the file's {stored:.3f} unless you give it --threshold"
        show_line(f"threshold not stored: this net lies in no run's folder{kept}")
        return False
    show_line(
        f"threshold {verified.threshold:.3f} stored in the run's {path.name}, where match, runs and export read it"
    )
    return True


def example_photos(result: "Result", images: Path | None) -> tuple[str, str]:
    """Return the photos of the first pair that was scored, or placeholders if the pairs came as a ``.bin`` file."""
    pairs = result.pairs
    if images is None or pairs.images:
        return PHOTOS
    left, right = resolve([pairs.paths[pairs.left[0]], pairs.paths[pairs.right[0]]], images)
    return str(images / left), str(images / right)


@app.command(rich_help_panel="Trained nets")
def match(
    a: Annotated[Path, typer.Argument(parser=local, help="Face crop; with --align a photo.")],
    b: Annotated[Path, typer.Argument(parser=local, help="Face crop or photo to compare with.")],
    model: Annotated[str, typer.Option(help=NET)],
    net: NetName = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Cosine from which two faces are one person. Default: the one that was measured last for this net."
        ),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Find and align the faces of uncropped photos; needs bigface\\[align].")
    ] = False,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Tell whether two photos show the same person, and how far to trust the answer."""
    from fr_core.nets.open import open_net
    from pipelines.nets.match import match as run
    from pipelines.nets.match import threshold_advice

    recogniser = open_net(model, net, trust_code=trust_code)
    show_pixels(model, recogniser)
    found = run(recogniser, a, b, model, threshold, align)
    for path in found.not_square:
        mend = "" if align else "; --align finds the face"
        show_line(f"warning: {path} is no square crop; {CENTRE}{mend}", "bold red")
    figures = {"cosine": found.cosine}
    if found.threshold is not None:
        figures["threshold"] = found.threshold
    if found.verified is not None:
        measured = {name: getattr(found.verified, name) for name in ("accuracy", "accuracy_low", "accuracy_high")}
        figures |= {name: value for name, value in measured.items() if value is not None}
    show("match", figures, json, verdict=found.verdict, threshold_from=found.source, cautions=found.cautions)
    if found.verdict is None:
        show_line(threshold_advice(recogniser, model, net))
        return
    show_line(f"{found.verdict}: cosine {found.cosine:.3f}, {found.source}")
    if a.resolve() == b.resolve():
        show_line("note: both photos are the same file", "yellow")
    for caution in found.cautions:
        show_line(f"caution: {caution}", "yellow")


@app.command(rich_help_panel="Trained nets")
def export(
    ckpt: Annotated[str, typer.Argument(help=FLOAT_NET)],
    out: Annotated[Path, typer.Option(parser=output, help="FILE.onnx; weights beyond 1.5 GiB go into a file beside.")],
    net: NetName = None,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    r"""Fold a net's batch norm, write it as ONNX, and compare it with the net; needs bigface\[export]."""
    from fr_core.nets.onnx_net import open_onnx
    from pipelines.nets.export import export as run
    from pipelines.nets.match import source_in_words

    replaced = out.is_file()
    with explain_disk_errors(out):
        figures = run(ckpt, out, net, partial(show_pixels, ckpt), trust_code)
    show("export", figures, json)
    verified = open_onnx(out).verified
    if verified is None:
        show_line("no threshold in the file: verify the run first, or give match --threshold", "yellow")
    else:
        show_line(f"in the file: {source_in_words(verified)}")
    if replaced:
        show_line(f"replaced: {out}")
    show_line(f"ONNX Runtime's embeddings are within {figures['max_difference']:.1e} of the net's")
    show_line(f"next: {command_line('match', *PHOTOS, '--model', out)}")


@app.command(rich_help_panel="Trained nets")
def prune(
    ckpt: Annotated[str, typer.Argument(help=FLOAT_NET)],
    out: Annotated[str, typer.Option(parser=any_output, help="FILE.safetensors; with --data the folder of a run.")],
    overrides: Overrides = None,
    ratio: Annotated[
        str, typer.Option(help="Share of the channels to drop, or one share for each stage: .1,.2,.2,.3.")
    ] = "0.2",
    round_to: Annotated[
        int, typer.Option(min=1, help="Number that the kept channels are a multiple of; 8 is fast.")
    ] = 1,
    importance: Annotated[
        str, typer.Option(help="Importance of a channel: l1 or l2 of its weights, or bn, the gain of its norm.")
    ] = "l1",
    data: Annotated[
        str | None, typer.Option(help="Shards to fine-tune on, with the unpruned net as the teacher.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe of the fine-tuning.")] = "prune_sp02",
    images: Annotated[Path | None, typer.Option(parser=local, help=PAIRS_IMAGES)] = None,
    pairs: Annotated[Path | None, typer.Option(parser=local, help=PAIRS)] = None,
    net: NetName = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    r"""Drop a net's least important channels, and fine-tune what is left; needs bigface\[compress]."""
    from pipelines.nets.prune import flat, prune_and_tune, table
    from pipelines.nets.prune import prune as run

    try:
        ratios = [float(share) for share in ratio.split(",")]
    except ValueError:
        raise UserError(f"--ratio {ratio}: give a number, or one for each stage, such as 0.1,0.2,0.2,0.3") from None
    what, seen = (ckpt, to_path(out), ratios), partial(show_pixels, ckpt)
    with explain_disk_errors(Path(out)):
        if data:
            options = {"data.path": data, "verify.images": images and str(images), "verify.pairs": pairs and str(pairs)}
            settings = [*(overrides or []), *(f"{name}={dumps(value)}" for name, value in options.items() if value)]
            found = prune_and_tune(
                *what, recipe, settings, round_to, importance, net, workers, in_process, resume, overwrite, seen
            )
        elif overrides or workers > 1 or in_process or resume or overwrite:
            raise UserError("these are options of a fine-tuning: give --data SHARDS, or leave them out")
        else:
            found = run(*what, round_to, importance, net, images, pairs, seen)
    show_table(table(found), "prune")
    write_json("prune", flat(found), json)
    next_command = ["match", *PHOTOS, "--model", out]
    if not (data and pairs):  # only the report of a fine-tuning that verified holds a threshold
        next_command = ["verify", out, "--images", str(images or "DIR"), "--pairs", str(pairs or "PAIRS.csv")]
    show_line(f"next: {command_line(*next_command)}")


@app.command(rich_help_panel="Trained nets")
def quantize(
    ckpt: Annotated[str, typer.Argument(help=FLOAT_NET)],
    data: Annotated[str, typer.Option(help="Flat shards; some 14,000 faces are enough.")],
    overrides: Overrides = None,
    weights: Annotated[int | None, typer.Option(min=2, max=8, help="Bits; default: the recipe's.")] = None,
    activations: Annotated[int | None, typer.Option(min=2, max=8, help="Bits; default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(parser=output, help="FILE.onnx for the net in integers.")] = None,
    net: NetName = None,
    recipe: Annotated[str, typer.Option(help="quantize_ekd, quantize_mse, or a TOML file.")] = "quantize_ekd",
    data_share: Annotated[float, typer.Option(help="Share of one epoch to train, such as 0.25.")] = 1.0,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="Measure the ranges of activations; train nothing.")
    ] = False,
    images: Annotated[Path | None, typer.Option(parser=local, help=PAIRS_IMAGES)] = None,
    pairs: Annotated[Path | None, typer.Option(parser=local, help=PAIRS)] = None,
    run: Annotated[
        str | None, typer.Option(parser=any_output, help="Folder of the run; default: runs/quantize_NAME-DATE.")
    ] = None,
    workers: Workers = 1,
    in_process: OneWorker = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --run.")] = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    r"""Quantise a net in one epoch on few faces, and write it in integers; needs bigface\[compress]."""
    from pipelines.nets.quantize import quantised_config, summarised, table
    from pipelines.nets.quantize import quantize as quantised

    if resume and run is None:
        raise UserError("--resume: name the run with --run")
    fields = {"data__path": data, "net__weights": weights, "net__activations": activations}
    verification = {"verify__images": images and str(images), "verify__pairs": pairs and str(pairs)}
    seen, given = partial(show_pixels, ckpt), {**fields, **verification}
    config = quantised_config(ckpt, recipe, net, data_share, calibrate_only, overrides or [], seen, **given)
    run = run or f"runs/quantize_{Path(ckpt).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    figures = quantised(config, to_path(run), out, workers, in_process, resume, overwrite, recipe)
    show("quantize", {name: value for name, value in figures.items() if name not in summarised()}, None)
    show_table(table(figures))
    write_json("quantize", figures, json)
    if out and getattr(config.net, "weights", 0) == 8:
        show_line(KERNELS)
    if figures.get("speedup", 1) < 1:
        slower = f"{1 / figures['speedup']:.2g} times as long"
        show_line(f"here the net in integers takes {slower} as the float net: the gain is the smaller file", "yellow")
    show_line(f"run: {shlex.quote(run)}")
    show_line(f"next: {command_line('match', *PHOTOS, '--model', out or run)}")
