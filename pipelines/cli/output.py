"""What commands print: figures, tables, progress; and files that cannot be written, in one line."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fr_core.data.store import explain_disk_errors

console = Console()


def show(command: str, figures: Mapping[str, float], json: Path | None, **more: object) -> None:
    """Prints figures as a table and writes the same as JSON where asked."""
    table = Table("figure", "value", title=command)
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.4f}"
        table.add_row(name, text)
    console.print(table)
    if json:
        from fr_core.verify.report import make_report, write_report

        with explain_disk_errors(json):
            write_report(json, make_report(command, figures, **more))


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
