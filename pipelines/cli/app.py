"""Face recognition: a folder of photos in, a verified net out.

Exit codes: 0 done, 2 your mistake (one line says what is wrong and the mend), 130 Ctrl-C, 143 SIGTERM, 1 other errors.
"""

from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def print_version(asked: bool) -> None:
    """Print the version and exit, if the option was given."""
    if asked:
        typer.echo(f"bigface {version('bigface')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
