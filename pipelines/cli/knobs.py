"""``bigface knobs``: the reference of all fields of a recipe."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column
from rich.table import Table as Printed

from fr_core.config.reference import HEADER, all_knobs, as_json, markdown, select, tables
from fr_core.data.store import explain_disk_errors
from pipelines.cli.app import app
from pipelines.cli.options import Json, output
from pipelines.cli.output import console, write_json


@app.command(rich_help_panel="Training")
def knobs(
    section: Annotated[
        str | None, typer.Argument(help="Section, kind or knob: optim, method.attfc, method.margin, net.depth …")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--markdown", parser=output, help="Write the page of all knobs to this file instead.")
    ] = None,
    json: Json = None,
) -> None:
    """List the knobs of a recipe: name, type, bounds, default, meaning."""
    chosen = select(section) if section else list(all_knobs())
    if page:
        with explain_disk_errors(page):
            page.write_text(markdown(), encoding="utf-8")
        console.print(f"page: {page}", markup=False)
    else:
        for table in tables(chosen):
            name, *more = HEADER
            others = [Column(heading, overflow="fold") for heading in more]  # a narrow terminal must hide nothing
            printed = Printed(Column(name, no_wrap=True), *others, title=escape(table.title or "top level"))
            for row in table.rows:
                printed.add_row(*map(escape, row))
            console.print(printed)
    write_json("knobs", {"knobs": len(chosen)}, json, knobs=as_json(chosen))
