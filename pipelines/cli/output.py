"""What commands print: figures, tables, progress bars, and commands to copy."""

import json as json_format
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fr_core.data.store import explain_disk_errors
from pipelines.logs import log, log_style

console = Console()
WIDE = 200  # columns of a table in a file or pipe, where no terminal tells its width
STDOUT = Path("-")  # as --json: the report goes to standard output, and what is for people to standard error
GAP = "  "  # between columns of plain lines


def show(command: str, figures: Mapping[str, float], json: Path | None, **more: object) -> None:
    """Print figures as a table, in a job as an event, and write them as JSON if a file is named."""
    if log_style() == "json":
        log.info("%s", command, extra={"facts": {"figures": dict(figures)}})
    else:
        show_table([("figure", "value"), *((name, number(value)) for name, value in figures.items())], command)
    write_json(command, figures, json, **more)


def write_json(command: str, figures: Mapping[str, float], json: Path | None, **more: object) -> None:
    """Write the report of a command if a file is named.

    Args:
        more: facts beside the figures.
    """
    if json is None:
        return
    from fr_core.verify.report import make_report, write_report

    report = make_report(command, figures, **more)
    if json == STDOUT:
        print(json_format.dumps(report, indent=1, allow_nan=False))
        return
    with explain_disk_errors(json):
        write_report(json, report)


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as ``1 image`` or ``1,200 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def number(value: float) -> str:
    """Return a figure as text: integers in full, from 1,000 on without decimals, else four significant digits."""
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show_table(rows: list[tuple[str, ...]], title: str | None = None) -> None:
    """Print a table, header first; in a job, log its rows."""
    if log_style() == "json":
        records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        log.info("%s", title or "table", extra={"facts": {"rows": records}})
        return
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")  # a narrow terminal must hide nothing
    for row in rows[1:]:
        table.add_row(*row)
    (console if console.is_terminal else Console(width=WIDE, stderr=console.stderr)).print(table)


def show_lines(rows: Sequence[tuple[str, ...]], first: Sequence[str]) -> None:
    """Print a table as plain aligned lines, header first: in a pipe all columns, on a terminal those that fit.

    Args:
        first: the headings, those first that a narrow terminal should show.
    """
    if log_style() == "json":
        show_table(list(rows))
        return
    widths = {heading: max(map(len, column)) for heading, *column in zip(rows[0], *rows, strict=True)}
    shown = rows[0] if not console.is_terminal else fitting(widths, first, console.width)
    for row in rows:
        cells = dict(zip(rows[0], row, strict=True))
        line = GAP.join((cells[name] or "-").ljust(widths[name]) for name in rows[0] if name in shown)
        print(line.rstrip(), file=console.file)
    if left_out := [heading for heading in rows[0] if heading not in shown]:
        show_line(f"not shown, as the terminal is narrow: {', '.join(left_out)}")


def fitting(widths: Mapping[str, int], first: Sequence[str], width: int) -> list[str]:
    """Return the headings of the columns that fit a width: as many as possible from the first on, at least one."""
    shown, used = [first[0]], widths[first[0]]
    for heading in first[1:]:
        if used + len(GAP) + widths[heading] > width:
            break
        shown.append(heading)
        used += len(GAP) + widths[heading]
    return shown


def command_line(*words: object) -> str:
    """Return a bigface command as one copies it into a shell: paths with spaces are quoted."""
    return shlex.join(["bigface", *map(str, words)])


def show_line(text: str, colour: str | None = None) -> None:
    """Print a line of plain text, which only the terminal breaks, so that commands in it can be copied.

    In a job it is an event.
    """
    if log_style() == "json":
        log.info("%s", text)
    else:
        console.print(f"[{colour}]{escape(text)}[/]" if colour else escape(text), highlight=False, soft_wrap=True)


def growing(advance: Callable[..., None]) -> Callable[[int, int], None]:
    """Return a callback for a bar whose caller reports images done so far, and images in all."""
    done = 0

    def progress(images: int, total: int) -> None:
        nonlocal done
        advance(images - done, total)
        done = images

    return progress


@contextmanager
def bar(name: str, total: int | None) -> Iterator:
    """Show a progress bar during the block; yield ``advance(count, total=None)``."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)

        def advance(count: int, total: int | None = None) -> None:
            progress.update(task, advance=count, total=total)

        yield advance
