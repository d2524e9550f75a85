"""The ``bigface`` command.

Exit codes: 0 done, 2 the user's mistake (one line), 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

import sys

from rich.console import Console
from rich.markup import escape

from fr_core.errors import RunStopped, UserError

from pipelines.cli import training, tune, knobs, data, nets, compare, bench  # isort: skip  # noqa: F401  # the help's order
from pipelines.cli.app import app


def main() -> None:
    """Run the command line; turn mistakes of the user, SIGTERM and Ctrl-C into one line and an exit code."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[red]bigface:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except RunStopped as stopped:
        Console(stderr=True).print(f"bigface: {stopped}", highlight=False)
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)
