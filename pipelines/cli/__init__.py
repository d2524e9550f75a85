"""The ``bigface`` command.

Exit codes: 0 done, 2 the user's mistake (one line), 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

import sys

from rich.console import Console
from rich.markup import escape

from fr_core.errors import RunStopped, UserError

from pipelines.cli import training, tune, knobs, data, shards, nets, compare, bench  # isort: skip  # noqa: F401  # the help's order
from pipelines.cli.app import app
from pipelines.cli.usage import UsageError, explain_usage
from pipelines.signals import CTRL_C


def main() -> None:
    """Run the command line; turn mistakes of the user, SIGTERM and Ctrl-C into one line and an exit code."""
    try:
        sys.exit(app(standalone_mode=False, prog_name="bigface"))
    except UserError as error:
        show_mistake(str(error))
        sys.exit(2)
    except UsageError as error:
        if "Usage:" in str(error):  # the help of a command without arguments
            error.show()  # type: ignore[attr-defined]
        else:
            show_mistake(explain_usage(error, sys.argv[1:]))
        sys.exit(2)
    except RunStopped as stopped:
        Console(stderr=True).print(f"bigface: {stopped}", highlight=False)
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(CTRL_C)


def show_mistake(text: str) -> None:
    """Print a mistake of the user on standard error, in one line."""
    Console(stderr=True).print(f"[red]bigface:[/] {escape(text)}", highlight=False, soft_wrap=True)
