"""Options and arguments that several commands take."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fr_core.config.recipes import recipes
from fr_core.data.store import refuse_job_folder, to_path
from fr_core.errors import UserError
from pipelines.cli.output import STDOUT, console


def local(ref: str | Path) -> Path:
    """Return a path on a local disk; ``~`` is the home folder.

    Raises:
        UserError: the reference is a URL.
    """
    if "://" in str(ref):
        raise UserError(f"{ref}: this option takes a local path, not a URL")
    return Path(os.path.expanduser(ref))


def output(ref: str | Path) -> Path:
    """Return a local path for output.

    Raises:
        UserError: the reference is a URL, or lies in a Ray job's folder, which vanishes with the job.
    """
    path = local(ref)
    refuse_job_folder(path)
    return path


def any_output(ref: str) -> str:
    """Return a local path or a URL for output; ``~`` is the home folder.

    Raises:
        UserError: the path lies in a Ray job's folder, which vanishes with the job.
    """
    path = to_path(ref)
    refuse_job_folder(path)
    return str(path)


def json_output(ref: str | Path) -> Path:
    """Return a local path for a report, or ``-`` for standard output."""
    return STDOUT if str(ref) == str(STDOUT) else output(ref)


def keep_stdout_for_json(json: Path | None) -> Path | None:
    """Send what is for people to standard error, if the report goes to standard output."""
    console.stderr = json == STDOUT
    return json


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        parser=json_output,
        callback=keep_stdout_for_json,
        help="Write the figures to this JSON file; - is standard output.",
    ),
]
NET = "A run, a checkpoint, or a file of weights: .safetensors, .pth, .pt, .ckpt, .onnx; also of other projects."
NET_NAME = "What a file holds where it does not tell: a family such as adaface, or a net such as iresnet50."
NetName = Annotated[str | None, typer.Option("--net", help=NET_NAME)]
TRUST_CODE = "Run the code that makes the net, if it is a net of code outside bigface (net.kind = factory)."
TrustCode = Annotated[bool, typer.Option("--trust-code", help=TRUST_CODE)]
Model = Annotated[str, typer.Option(help=NET)]
InProcess = Annotated[bool, typer.Option("--in-process", help="Run without Ray.")]
OneWorker = Annotated[bool, typer.Option("--in-process", help="Run one worker without Ray.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Recipe = Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields of the recipe: key.path=value …; see bigface knobs.", show_default=False),
]
RunFolder = Annotated[
    str | None, typer.Option("--out", parser=any_output, help="Folder or URL of the run; default runs/RECIPE-DATE.")
]


def worker_range(text: str | int) -> int | tuple[int, int]:
    """Read a number of workers such as ``4``, or a range such as ``2-4``.

    Returns:
        The number, or the least and the most.

    Raises:
        UserError: neither a number of at least 1 nor a range.
    """
    least, dash, most = str(text).partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()) or int(least) < 1 or (dash and int(most) < int(least)):
        raise UserError(f"--workers {text}: give a number such as 4, or a range such as 2-4")
    return (int(least), int(most)) if dash else int(least)


Workers = Annotated[int, typer.Option(min=1, help="Ray Train workers.")]
WorkerRange = Annotated[
    Any,
    typer.Option(
        parser=worker_range, metavar="N|MIN-MAX", help="Ray Train workers; 2-4: as many as the cluster has room for."
    ),
]
Wait = Annotated[
    float,
    typer.Option(min=0, metavar="MINUTES", help="Longest wait for machines of a cluster that grows or is busy."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")]
