"""Commands on faces and datasets."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fr_core.data.schema import CHUNK_IMAGES, Dataset, Layout, Manifest, open_dataset
from fr_core.data.store import RemotePath, explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import NET, InProcess, Json, Model, NetName, Overwrite, any_output, local, output
from pipelines.cli.output import bar, command_line, growing, show, show_line
from pipelines.datasets.unpack import Form

SHOWN_NAMES = 5  # at each end of the list
PEOPLE_TO_SPLIT = 8  # bigface split refuses fewer people
MANY_LISTED = 0.1  # share of the images: if clean lists more, the net is the likelier culprit
# The first recipe that fits the number of people and images is proposed.
EXAMPLE_RECIPES: dict[Layout, tuple[str, ...]] = {
    "flat": ("bigface_small", "debug_bigface"),
    "grouped": ("attfc_r50", "debug_attfc", "debug_virtual_fc"),
}
SHARDS = "Shards from bigface ingest: a folder or a URL."


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as ``1 image`` or ``1,200 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


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
            f"warning: a fold has {count_of(distinct, 'different pair')} of one person: --pairs {pairs} repeats some",
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
        str | None, typer.Option(help="List of images and their people, for a folder of loose images.")
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
def inspect(
    shards: Annotated[str, typer.Argument(help=SHARDS)],
    out: Annotated[
        Path | None, typer.Option(parser=output, help="Folder for a histogram, a contact sheet and findings.csv.")
    ] = None,
    json: Json = None,
) -> None:
    """Describe a dataset: images of each person, a sheet of faces, damaged images and duplicates."""
    from pipelines.datasets.inspect import inspect as run

    with bar("inspect", None) as advance, explain_disk_errors(out or Path()):
        figures = run(shards, out, growing(advance))
    show("inspect", figures, json)
    if out:
        show_line(f"pictures and list: {out / 'identities.png'}, {out / 'faces.png'}, {out / 'findings.csv'}")


@app.command(rich_help_panel="Faces and datasets")
def unpack(
    shards: Annotated[str, typer.Argument(help=SHARDS)],
    out: Annotated[Path, typer.Option(parser=output, help="An empty or new folder.")],
    form: Annotated[Form, typer.Option("--as", help="folders: one for each person; webdataset: tars.")] = "folders",
    json: Json = None,
) -> None:
    """Turn shards back into images; the JPEG bytes stay as they are."""
    from pipelines.datasets.unpack import unpack as run

    with bar("unpack", None) as advance, explain_disk_errors(out):
        images = run(shards, out, form, growing(advance))
    show("unpack", {"images": images}, json)
    show_line(f"images: {out}" if form == "folders" else f"tars and identities.csv: {out}")


@app.command(rich_help_panel="Faces and datasets")
def embed(
    model: Annotated[str, typer.Argument(help=NET)],
    data: Annotated[str, typer.Option(help=SHARDS)],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for Parquet files of sample_id, label, embedding.")],
    net: NetName = None,
    flip: Annotated[
        bool, typer.Option(help="Add the embedding of the mirrored image, as the verification protocols do.")
    ] = True,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Embed every image of a dataset; the same command continues a stopped job."""
    from pipelines.datasets.embed import embed as run

    started = time.monotonic()
    reports: list[int] = []  # images done at each report; the first report counts those of an earlier job
    with bar("embed", None) as advance, explain_disk_errors(out):
        report = growing(advance)

        def progress(done: int, total: int) -> None:
            reports.append(done)
            report(done, total)

        facts = run(model, to_path(data), out, net, flip, not in_process, overwrite, progress=progress).facts
    seconds = time.monotonic() - started
    show("embed", {"images": facts.images, "embedding": facts.embedding, "seconds": seconds}, json)
    if reports[0] == facts.images:
        show_line("all embeddings were there already; --overwrite makes them anew")
    show_line(f"embeddings: {out / 'embeddings-*.parquet'}")


@app.command(rich_help_panel="Faces and datasets")
def clean(
    shards: Annotated[str, typer.Argument(help=SHARDS)],
    model: Model,
    out: Annotated[Path, typer.Option(parser=output, help="Folder for clean.csv, a picture, and the embeddings.")],
    net: NetName = None,
    outlier: Annotated[
        float, typer.Option(min=-1, max=1, help="An image below this cosine to the rest of its person is an outlier.")
    ] = 0.2,
    flip: Annotated[
        float,
        typer.Option(min=-1, max=1, help="An image at this cosine or more to another person's centre can be flipped."),
    ] = 0.4,
    copy: Annotated[
        float,
        typer.Option(min=-1, max=1, help="An image at this cosine or more to an earlier one of its person is a copy."),
    ] = 0.98,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """List flipped labels, outliers and copies, by the embeddings of a good net; delete nothing."""
    from torch import device

    from fr_core.nets.open import open_net
    from pipelines.datasets.clean import Limits
    from pipelines.datasets.clean import clean as run
    from pipelines.nets.match import poor_net

    if poor := poor_net(open_net(model, net, device("cpu")).verified):
        show_line(f"caution: {poor}", "yellow")
    with bar("embed", None) as advance, explain_disk_errors(out):
        limits = Limits(outlier, flip, copy)
        figures = run(to_path(shards), model, out, net, limits, not in_process, growing(advance))
    show("clean", figures, json)
    if listed := int(figures["flips"] + figures["outliers"] + figures["copies"]):
        if listed > MANY_LISTED * figures["images"]:
            images = count_of(int(figures["images"]), "image")
            show_line(
                f"warning: {listed:,} of {images} are listed, more than wrong labels explain: "
                f"look at {out / 'clean.png'} first, or take a better net",
                "bold red",
            )
        show_line(f"leave them out: {command_line('merge', shards, '--without', out / 'clean.csv', '--out', 'NEW')}")


@app.command(rich_help_panel="Faces and datasets")
def overlap(
    shards: Annotated[str, typer.Argument(help="The training set: shards from bigface ingest.")],
    verify: Annotated[
        Path, typer.Argument(parser=local, help="The verification set: a folder of people, a list of pairs, or a .bin.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(parser=output, help="Folder for overlap.csv and the embeddings.")],
    net: NetName = None,
    images: Annotated[
        Path | None, typer.Option(parser=local, help="Folder that the pairs' paths are relative to.")
    ] = None,
    least: Annotated[
        float, typer.Option(min=-1, max=1, help="Two people at this cosine of centres or more are one person.")
    ] = 0.6,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """List training images of people whom a verification set shows too, by names and faces; delete nothing."""
    from torch import device

    from fr_core.nets.open import open_net
    from pipelines.datasets.overlap import overlap as run
    from pipelines.nets.match import poor_net

    if poor := poor_net(open_net(model, net, device("cpu")).verified):
        show_line(f"caution: {poor}", "yellow")
    with bar("embed", None) as advance, explain_disk_errors(out):
        figures = run(to_path(shards), verify, model, out, net, images, least, not in_process, growing(advance))
    show("overlap", figures, json)
    if figures["identities"]:
        show_line(f"leave them out: {command_line('merge', shards, '--without', out / 'overlap.csv', '--out', 'NEW')}")


@app.command(rich_help_panel="Faces and datasets")
def merge(
    datasets: Annotated[list[str], typer.Argument(help="Shards from bigface ingest, all flat or all grouped.")],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for the new shards.")],
    same_names: Annotated[
        bool, typer.Option("--same-names", help="Identities of the same name are one person.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="A good net: identities with near centres are one person.")] = None,
    net: NetName = None,
    overlap: Annotated[
        float,
        typer.Option(
            min=-1, max=1, help="With --model: two identities at this cosine of centres or more are one person."
        ),
    ] = 0.7,
    without: Annotated[
        Path | None,
        typer.Option(parser=local, help="CSV of sample_id to leave out, such as clean.csv; for one dataset."),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(min=2, help="Cut the rows of grouped shards to so many images; default: as they are."),
    ] = None,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Make one dataset of several, or copy one without listed images; identity_map.csv lists the new names."""
    from pipelines.datasets.merge import merge as run

    with bar("merge", None) as advance, explain_disk_errors(out):
        figures = run(
            list(map(to_path, datasets)),
            out,
            same_names,
            model,
            net,
            overlap,
            without,
            not in_process,
            chunk=chunk,
            progress=growing(advance),
        )
    shared_names = int(figures.pop("shared_names"))
    show("merge", figures, json)
    if shared_names and not (same_names or model):
        names = count_of(shared_names, "name is", "names are")
        show_line(
            f"warning: {names} in several of the datasets and count as different people; --same-names joins them",
            "yellow",
        )
    show_line(f"shards: {out}   new names: {out / 'identity_map.csv'}")


@app.command(rich_help_panel="Faces and datasets")
def split(
    shards: Annotated[str, typer.Argument(help=SHARDS)],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for train/ (shards), verify/ (images, pairs.csv).")],
    share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.5,
            help="Share of the people to hold out. Default: 0.1, raised to 20 people, but half of them at most.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of each kind in each fold, of up to ten folds.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Another seed holds other people out.")] = 0,
    json: Json = None,
) -> None:
    """Hold people out of a dataset to verify on: shards to train on, and images and pairs of the people held out."""
    from pipelines.datasets.split import ENOUGH_HELD_OUT, interval_of
    from pipelines.datasets.split import split as run

    with bar("split", None) as advance, explain_disk_errors(out):
        figures = run(to_path(shards), out, share, pairs, seed, growing(advance))
    show("split", figures, json)
    people, images = int(figures["held_out_identities"]), int(figures["held_out_images"])
    drawn, distinct, folds = (int(figures[name]) for name in ("pairs", "distinct_pairs", "folds"))
    show_line(
        f"held out: {people:,} people, {count_of(images, 'image')}; {drawn:,} pairs of them, {distinct:,} different, "
        f"in {folds} folds"
    )
    dataset = open_dataset(to_path(shards))
    if people < ENOUGH_HELD_OUT:
        most = int((dataset.identity_counts() > 1).sum()) // 2
        mend = "hold out more with --share" if people < most else "ingest photos of more people"
        few, enough = (100 * interval_of(count) for count in (people, ENOUGH_HELD_OUT))
        show_line(
            f"warning: {people} people give a wide 95 % interval, about ±{few:.2g} points at an accuracy of 90 %; "
            f"{ENOUGH_HELD_OUT} people give ±{enough:.2g}: {mend}, or use a larger set of pairs",
            "yellow",
        )
    verify = out / "verify"
    paths = (f"data.path={out / 'train'}", f"verify.images={verify / 'images'}", f"verify.pairs={verify / 'pairs.csv'}")
    recipe = fitting_recipe(open_dataset(out / "train"))
    command = command_line("train", recipe or "RECIPE", *paths)
    of_layout = (
        f"another RECIPE for {dataset.manifest.layout} shards"
        if recipe
        else (f"a RECIPE of a smaller train.global_batch for {dataset.manifest.layout} shards")
    )
    show_line(f"next, or with {of_layout}: {command}")


def fitting_recipe(dataset: Dataset) -> str | None:
    """Return the first example recipe that can train on a dataset, or None if all need more people or images."""
    from fr_core.config.recipes import load_config
    from fr_core.train.check import fitting_plan

    for recipe in EXAMPLE_RECIPES[dataset.manifest.layout]:
        with suppress(UserError):
            fitting_plan(load_config(recipe), dataset, 1)
            return recipe
    return None


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
