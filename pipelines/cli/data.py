"""Commands that draw, pack and mask faces."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fr_core.data.schema import CHUNK_IMAGES, Layout, Manifest, open_dataset
from fr_core.data.store import RemotePath, explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import InProcess, Json, Overwrite, any_output, local, output
from pipelines.cli.output import bar, command_line, count_of, growing, show, show_line

SHOWN_NAMES = 5  # at each end of the list
PEOPLE_TO_SPLIT = 8  # bigface split refuses fewer people


@app.command(rich_help_panel="Faces and datasets")
def synth(
    out: Annotated[Path, typer.Option(parser=output, help="Folder for images/, landmarks.csv and pairs.csv.")],
    identities: Annotated[int, typer.Option(min=1, help="People to draw.")] = 200,
    shots: Annotated[int, typer.Option(min=1, help="Images of each person.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other people.")] = 0,
    size: Annotated[int, typer.Option(min=16, help="Side of an image in pixels.")] = 112,
    first_identity: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of the first person drawn. Start after the training set's last person to draw new people.",
        ),
    ] = 0,
    pairs: Annotated[
        int, typer.Option(min=0, help="Pairs of each kind in each of ten folds of pairs.csv; 0: no pairs.csv.")
    ] = 0,
    json: Json = None,
) -> None:
    """Draw procedural faces with landmarks; pose, expression, light and other nuisances vary."""
    from fr_core.data.synthetic import write_faces
    from fr_core.verify.pairs import write_pairs

    if (out / "images").is_dir() and any((out / "images").iterdir()):
        raise UserError(f"{out / 'images'} holds faces already: use another folder, or remove it first")
    if pairs:
        _check_pairs(identities, shots, pairs)
    started, total = time.monotonic(), identities * shots
    with bar("synth", total) as advance, explain_disk_errors(out):
        report = growing(advance)
        images = write_faces(
            out, identities, shots, seed, size, first_identity=first_identity, progress=lambda done: report(done, total)
        )
        if pairs:
            write_pairs(out, pairs, seed)
    show("synth", {"images": images, "images_per_second": images / (time.monotonic() - started)}, json)
    show_line(f"images: {out / 'images'}" + (f"   pairs: {out / 'pairs.csv'}" if pairs else ""))
    show_line(f"next: {command_line('ingest', out / 'images', '--out', out.with_name(f'{out.name}-shards'))}")


def _check_pairs(identities: int, shots: int, pairs: int) -> None:
    """Refuse pairs that the people cannot make, and warn if pairs must repeat.

    Raises:
        UserError: fewer than two people for a fold, or one image of each person.
    """
    from fr_core.verify.pairs import FOLDS

    if identities < 2 * FOLDS:
        raise UserError(
            f"--pairs {pairs} needs {2 * FOLDS} people, two for each of {FOLDS} folds: --identities {identities} are "
            f"too few; use --identities {2 * FOLDS} or more, or leave --pairs out"
        )
    if shots < 2:
        raise UserError(f"--pairs {pairs} needs two images of each person: use --shots 2 or more, or leave --pairs out")
    distinct = identities // FOLDS * math.comb(shots, 2)
    if pairs > distinct:
        show_line(
            f"warning: a fold has {count_of(distinct, 'distinct pair')} of one person: --pairs {pairs} repeats some",
            "yellow",
        )


@app.command(rich_help_panel="Faces and datasets")
def ingest(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder of PERSON/photo.jpg; a .rec, .zip, .tar, .parquet, .arrow, .lmdb or .tfrecord; "
            "a list of files; or a URL: s3://BUCKET/FOLDER, hf://datasets/OWNER/NAME."
        ),
    ],
    out: Annotated[str, typer.Option(parser=any_output, help="Folder for the shards, or a URL: s3://BUCKET/FOLDER.")],
    layout: Annotated[
        Layout, typer.Option(help="flat, or grouped by person: for attfc, dcq, f2c and virtual_fc.")
    ] = "flat",
    landmarks: Annotated[
        str | None,
        typer.Option(help="Table of 5 or 68 points per image to align by; left is the left of the image."),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Find the face in each photo and align it; needs bigface\\[align].")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(help="List of images and their people, for a folder of loose images; of records, for a .rec."),
    ] = None,
    level: Annotated[
        int | None,
        typer.Option(min=1, help="Which folder below SRC is a person: 1 is the first. Left out: found by the layout."),
    ] = None,
    names_in: Annotated[
        str | None, typer.Option(help="Encoding of a zip's file names, if the zip states none: gbk, shift_jis ….")
    ] = None,
    unlabelled: Annotated[
        bool,
        typer.Option("--unlabelled", help="Take all images below the folder, of unknown people, for distillation."),
    ] = False,
    size: Annotated[int, typer.Option(min=16, help="Side of the crops in pixels.")] = 112,
    chunk: Annotated[
        int,
        typer.Option(min=2, max=32, help="Images of a person in a row of grouped shards: class images come from them."),
    ] = CHUNK_IMAGES,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Turn faces into Parquet shards with a manifest; rejects.csv lists the images left out and why."""
    from pipelines.datasets.ingest import ingest as run

    started = time.monotonic()
    with bar("ingest", None) as advance:
        manifest = run(
            src,
            out,
            layout,
            size,
            landmarks,
            labels,
            overwrite,
            not in_process,
            align=align,
            unlabelled=unlabelled,
            chunk=chunk,
            level=level,
            names_in=names_in,
            progress=growing(advance),
        )
    seconds = time.monotonic() - started
    not_square = manifest.warnings.get("not_square", 0)
    figures = {
        "images": manifest.images,
        "identities": manifest.identities,
        "shards": len(manifest.shards),
        "rejected": sum(manifest.rejects.values()),
        "not_square": not_square,
        "images_per_second": manifest.images / seconds,
    }
    show("ingest", figures, json)
    dataset = open_dataset(out)
    counts = dataset.identity_counts()
    for note in manifest.notes:
        show_line(f"read as: {note}", "yellow")
    for reason, number in manifest.passed.items():
        show_line(f"passed over: {reason}: {number:,}", "yellow")
    if repaired := manifest.warnings.get("repaired", 0):
        show_line(f"repaired: {count_of(repaired, 'JPEG')} without an end, or with extra bytes", "yellow")
    if not unlabelled:
        show_line(f"people: {_first_and_last(dataset.identity_names())}")
    if not_square:
        show_line(
            f"warning: {count_of(not_square, 'image is', 'images are')} not square; the central square was taken for "
            "the face. Align photos with --align or --landmarks for much better recognition.",
            "bold red",
        )
    empty, single = int((counts == 0).sum()), int((counts == 1).sum())
    if empty:
        show_line(f"warning: {count_of(empty, 'person has', 'people have')} no usable image", "yellow")
    if single and not unlabelled:
        show_line(
            f"warning: {count_of(single, 'person has', 'people have')} one image only: they teach little, and cannot "
            "be held out to verify on",
            "yellow",
        )
    show_line(_ingest_summary(manifest, out, unlabelled))
    show_line(f"next: {_after_ingest(out, unlabelled, int((counts > 1).sum()))}")


def _first_and_last(names: Sequence[str]) -> str:
    """Return the five first and the five last names, so that a user sees what became a person."""
    if len(names) <= 2 * SHOWN_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN_NAMES])} … {', '.join(names[-SHOWN_NAMES:])}"


def _ingest_summary(manifest: Manifest, out: str, unlabelled: bool) -> str:
    """Return people, images and the images left out by reason, in one line."""
    people = "unknown people" if unlabelled else count_of(manifest.identities, "person", "people")
    left_out = sum(manifest.rejects.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejects.items())
    listed = f": {reasons}; listed in {to_path(out) / 'rejects.csv'}" if left_out else ""
    return f"{out}: {count_of(manifest.images, 'image')} of {people}; {count_of(left_out, 'image')} left out{listed}"


def _after_ingest(out: str, unlabelled: bool, candidates: int) -> str:
    """Return the command to run after ingest.

    Args:
        candidates: number of people with two images or more.
    """
    if unlabelled:
        return command_line("distill", "RECIPE", "data.path=LABELLED", "--teacher", "RUN", "--unlabelled", out)
    place = to_path(out)
    beside = Path(place.name) if isinstance(place, RemotePath) else place
    if candidates < PEOPLE_TO_SPLIT:
        return command_line("inspect", out, "--out", beside.with_name(f"{beside.name}-looks"))
    return command_line("split", out, "--out", beside.with_name(f"{beside.name}-split"))


@app.command(rich_help_panel="Faces and datasets")
def mask(
    src: Annotated[Path, typer.Argument(parser=local, help="Folder of aligned crops, at any depth.")],
    out: Annotated[Path, typer.Option(parser=output, help="An empty or new folder.")],
    pairs: Annotated[
        Path | None,
        typer.Option(parser=local, help="Mask the images of these pairs; makes a suite for bigface verify --suite."),
    ] = None,
    landmarks: Annotated[Path | None, typer.Option(parser=local, help="CSV of 5 or 68 points per image.")] = None,
    ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images to mask; with --pairs all are masked.")
    ] = 1.0,
    rendered: Annotated[float, typer.Option(min=0, max=1, help="Share of the masks that the 3D tool renders.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other masks.")] = 0,
    json: Json = None,
) -> None:
    """Put synthetic masks on faces: on copies of a folder, or on a verification set."""
    from fr_core.config.sections import Masks
    from pipelines.datasets.mask import mask as run

    with bar("mask", None) as advance, explain_disk_errors(out):
        figures = run(src, out, Masks(ratio=ratio, rendered=rendered), landmarks, pairs, seed, growing(advance))
    show("mask", figures, json)
    if figures["rejected"]:
        listed = out / "rejects.csv"
        show_line(f"left out: {count_of(figures['rejected'], 'image')}; listed in {listed}", "yellow")
    if pairs:
        show_line(f"next: {command_line('verify', 'RUN', '--suite', out)}")
