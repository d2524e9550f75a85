"""Commands on faces and datasets."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fr_core.data.schema import Layout
from fr_core.data.store import explain_disk_errors, to_path
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import NET, InProcess, Json, Model, NetName, Overwrite, any_output, local, output
from pipelines.cli.output import bar, console, growing, show
from pipelines.datasets.unpack import Form


@app.command(rich_help_panel="Faces and datasets")
def synth(
    out: Annotated[Path, typer.Option(parser=output, help="Folder for images/, landmarks.csv and pairs.csv.")],
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

    if (out / "images").is_dir() and any((out / "images").iterdir()):
        raise UserError(f"{out / 'images'} holds faces already: use another folder, or remove it first")
    started = time.monotonic()
    with bar("synth", identities * shots) as advance, explain_disk_errors(out):
        images = write_faces(out, identities, shots, seed, size, first_identity=first_identity, progress=advance)
        if pairs:
            write_pairs(out, pairs, seed)
    show("synth", {"images": images, "images_per_second": images / (time.monotonic() - started)}, json)


@app.command(rich_help_panel="Faces and datasets")
def ingest(
    src: Annotated[
        str, typer.Argument(help="Folder of IDENTITY/photo.jpg or .png; .rec, .zip, .tar; a list of files; or a URL.")
    ],
    out: Annotated[str, typer.Option(parser=any_output, help="Folder for the shards, or a URL: s3://BUCKET/FOLDER.")],
    layout: Annotated[Layout, typer.Option(help="flat, or grouped by identity.")] = "flat",
    landmarks: Annotated[
        str | None,
        typer.Option(help="CSV of 5 points per image, or 68, to align by: path,left_eye_x … or path,x_0 …."),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Find the face in each photo and align it; needs bigface\\[align].")
    ] = False,
    labels: Annotated[str | None, typer.Option(help="List of 'path identity', for a folder of loose images.")] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="A folder of faces of nobody known: for distillation.")
    ] = False,
    size: Annotated[int, typer.Option(min=16, help="Pixels of the crops.")] = 112,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Turn a folder of faces into Parquet shards with a manifest; what cannot be used is listed in rejects.csv."""
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
            progress=growing(advance),
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


@app.command(rich_help_panel="Faces and datasets")
def inspect(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them; a folder or a URL.")],
    out: Annotated[
        Path | None, typer.Option(parser=output, help="Folder for a histogram, a contact sheet and findings.csv.")
    ] = None,
    json: Json = None,
) -> None:
    """Say what is in a dataset: sizes of identities, faces, damaged images, images that are there twice."""
    from pipelines.datasets.inspect import inspect as run

    with bar("inspect", None) as advance, explain_disk_errors(out or Path()):
        figures = run(shards, out, growing(advance))
    show("inspect", figures, json)


@app.command(rich_help_panel="Faces and datasets")
def unpack(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them; a folder or a URL.")],
    out: Annotated[Path, typer.Option(parser=output, help="An empty or new folder.")],
    form: Annotated[Form, typer.Option("--as", help="folders, one a person, or webdataset tars.")] = "folders",
    json: Json = None,
) -> None:
    """Turn shards back into images, JPEG bytes untouched."""
    from pipelines.datasets.unpack import unpack as run

    with bar("unpack", None) as advance, explain_disk_errors(out):
        images = run(shards, out, form, growing(advance))
    show("unpack", {"images": images}, json)


@app.command(rich_help_panel="Faces and datasets")
def embed(
    model: Annotated[str, typer.Argument(help=NET)],
    data: Annotated[str, typer.Option(help="Shards, as bigface ingest leaves them.")],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for Parquet files of sample_id, label, embedding.")],
    net: NetName = None,
    flip: Annotated[bool, typer.Option(help="Add the mirrored image's embedding, as the protocols do.")] = True,
    overwrite: Overwrite = False,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """Embed every image of a dataset; begun again, it goes on where it was stopped."""
    from pipelines.datasets.embed import embed as run

    started = time.monotonic()
    with bar("embed", None) as advance, explain_disk_errors(out):
        facts = run(model, to_path(data), out, net, flip, not in_process, overwrite, progress=growing(advance)).facts
    seconds = time.monotonic() - started
    show("embed", {"images": facts.images, "embedding": facts.embedding, "seconds": seconds}, json)


@app.command(rich_help_panel="Faces and datasets")
def clean(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them.")],
    model: Model,
    out: Annotated[Path, typer.Option(parser=output, help="Folder for clean.csv, a picture, and the embeddings.")],
    net: NetName = None,
    outlier: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to the rest of its identity.")] = 0.2,
    flip: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to another identity's centre.")] = 0.4,
    copy: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine to an earlier image of its own.")] = 0.98,
    in_process: InProcess = False,
    json: Json = None,
) -> None:
    """List flipped labels, outliers and copies, by the embeddings of a good net; nothing is deleted."""
    from pipelines.datasets.clean import Limits
    from pipelines.datasets.clean import clean as run

    with bar("embed", None) as advance, explain_disk_errors(out):
        limits = Limits(outlier, flip, copy)
        figures = run(to_path(shards), model, out, net, limits, not in_process, growing(advance))
    show("clean", figures, json)
    command = shlex.join(["bigface", "merge", shards, "--without", str(out / "clean.csv"), "--out", "NEW"])
    console.print(f"leave them out: {command}", markup=False, soft_wrap=True)


@app.command(rich_help_panel="Faces and datasets")
def merge(
    datasets: Annotated[list[str], typer.Argument(help="As bigface ingest leaves them, all flat or all grouped.")],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for the new shards.")],
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
            progress=growing(advance),
        )
    show("merge", figures, json)


@app.command(rich_help_panel="Faces and datasets")
def split(
    shards: Annotated[str, typer.Argument(help="As bigface ingest leaves them.")],
    out: Annotated[Path, typer.Option(parser=output, help="Folder for train/ (shards), verify/ (images, pairs.csv).")],
    share: Annotated[float, typer.Option(min=0, max=0.5, help="Of the identities, held out.")] = 0.1,
    pairs: Annotated[int, typer.Option(min=1, help="Of each kind per fold.")] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = None,
) -> None:
    """Hold identities out of a dataset to verify on."""
    from pipelines.datasets.merge import split as run

    with bar("split", None) as advance, explain_disk_errors(out):
        figures = run(to_path(shards), out, share, pairs, seed, growing(advance))
    show("split", figures, json)


@app.command(rich_help_panel="Faces and datasets")
def mask(
    src: Annotated[Path, typer.Argument(parser=local, help="Folder of aligned crops, at any depth.")],
    out: Annotated[Path, typer.Option(parser=output, help="An empty or new folder.")],
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
    from fr_core.config.sections import Masks
    from pipelines.datasets.mask import mask as run

    with bar("mask", None) as advance, explain_disk_errors(out):
        figures = run(src, out, Masks(ratio=ratio, rendered=rendered), landmarks, pairs, seed, growing(advance))
    if figures["rejected"]:
        listed = escape(str(out / "rejects.csv"))
        console.print(f"[yellow]left out: {figures['rejected']} images; listed in {listed}[/]")
    show("mask", figures, json)
