"""Face recognition: a folder of photos in, a verified net out.

Exit codes: 0 done, 2 your mistake (one line says what and the mend), 130 Ctrl-C, 1 anything else.
"""

# What all commands share: the application, its options, tables and progress bars.

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fr_core.config import recipes
from fr_core.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()


def local(ref: str | Path) -> Path:
    """Of what is written here and not at a URL."""
    if "://" in str(ref):
        raise UserError(f"{ref}: this can only lie on a local disk")
    return Path(ref)


Json = Annotated[Path | None, typer.Option("--json", parser=local, help="Write the figures to this JSON file.")]
NET = "A run, a checkpoint, FILE.onnx, or weights.safetensors with --net."
NetName = Annotated[str | None, typer.Option("--net", help="For bare weights: mobilefacenet or iresnetDEPTH.")]
Model = Annotated[str, typer.Option(help=NET)]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray.")]
OneWorker = Annotated[bool, typer.Option("--in-process", help="Without Ray, one worker.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Recipe = Annotated[str, typer.Argument(help=f"A TOML file, or one of: {', '.join(recipes())}.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value …", show_default=False)]
RunFolder = Annotated[str | None, typer.Option("--out", help="Folder of the run, or a URL; default runs/RECIPE-DATE.")]
Workers = Annotated[int, typer.Option(min=1, help="Ray Train workers.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]


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
