"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fr_core.config.recipes import recipes
from fr_core.data.store import refuse_job_folder, to_path
from fr_core.errors import UserError


def local(ref: str | Path) -> Path:
    """Of what is written here and not at a URL."""
    if "://" in str(ref):
        raise UserError(f"{ref}: this can only lie on a local disk")
    return Path(ref)


def output(ref: str | Path) -> Path:
    """Of what is left here on a local disk."""
    refuse_job_folder(local(ref))
    return Path(ref)


def any_output(ref: str) -> str:
    """Of what is left here or at a URL."""
    refuse_job_folder(to_path(ref))
    return ref


Json = Annotated[Path | None, typer.Option("--json", parser=output, help="Write the figures to this JSON file.")]
NET = "A run, a checkpoint, FILE.onnx, or weights.safetensors with --net."
NetName = Annotated[str | None, typer.Option("--net", help="For bare weights: mobilefacenet or iresnetDEPTH.")]
Model = Annotated[str, typer.Option(help=NET)]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray.")]
OneWorker = Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Recipe = Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value …", show_default=False)]
RunFolder = Annotated[
    str | None, typer.Option("--out", parser=any_output, help="Folder of the run, or a URL; default runs/RECIPE-DATE.")
]


def worker_range(text: str | int) -> int | tuple[int, int]:
    """Of ``4``, or of ``2-4``: the least and the most."""
    least, dash, most = str(text).partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()) or int(least) < 1 or (dash and int(most) < int(least)):
        raise UserError(f"--workers {text}: a number such as 4, or the least and the most, such as 2-4")
    return (int(least), int(most)) if dash else int(least)


Workers = Annotated[int, typer.Option(min=1, help="Ray Train workers.")]
WorkerRange = Annotated[
    Any,
    typer.Option(
        parser=worker_range, metavar="N|MIN-MAX", help="Ray Train workers; 2-4: as many as there is room for."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
