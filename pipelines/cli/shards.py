"""Commands on shards: to look at them, to clean, join and cut them."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fr_core.data.schema import Dataset, Layout, open_dataset
from fr_core.data.store import explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import NET, InProcess, Json, Model, NetName, Overwrite, TrustCode, local, output
from pipelines.cli.output import bar, command_line, count_of, growing, show, show_line
from pipelines.datasets.unpack import Form

MANY_LISTED = 0.1  # share of the images: if clean lists more, the net is the likelier culprit
# The first recipe that fits the number of people and images is proposed.
EXAMPLE_RECIPES: dict[Layout, tuple[str, ...]] = {
    "flat": ("bigface_small", "debug_bigface"),
    "grouped": ("attfc_r50", "debug_attfc", "debug_virtual_fc"),
}
SHARDS = "Shards from bigface ingest: a folder or a URL."


def warn_of_poor_net(model: str, net: str | None, trust_code: bool) -> None:
    """Say so if the net that judges faces is known to be poor."""
    from torch import device

    from fr_core.nets.open import open_net
    from pipelines.nets.match import poor_net

    if poor := poor_net(open_net(model, net, device("cpu"), trust_code=trust_code).verified):
        show_line(f"caution: {poor}", "yellow")


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
    trust_code: TrustCode = False,
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

        facts = run(
            model,
            to_path(data),
            out,
            net,
            flip,
            not in_process,
            overwrite,
            progress=progress,
            trust_code=trust_code,
        ).facts
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
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """List flipped labels, outliers and copies, by the embeddings of a good net; delete nothing."""
    from pipelines.datasets.clean import Limits
    from pipelines.datasets.clean import clean as run

    warn_of_poor_net(model, net, trust_code)
    with bar("embed", None) as advance, explain_disk_errors(out):
        limits = Limits(outlier, flip, copy)
        figures = run(to_path(shards), model, out, net, limits, not in_process, growing(advance), trust_code)
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
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """List training images of people whom a verification set shows too, by names and faces; delete nothing."""
    from pipelines.datasets.overlap import overlap as run

    warn_of_poor_net(model, net, trust_code)
    with bar("embed", None) as advance, explain_disk_errors(out):
        figures = run(
            to_path(shards), verify, model, out, net, images, least, not in_process, growing(advance), trust_code
        )
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
    trust_code: TrustCode = False,
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
            trust_code=trust_code,
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
        f"held out: {people:,} people, {count_of(images, 'image')}; {drawn:,} pairs of them, {distinct:,} distinct, "
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
