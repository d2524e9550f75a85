"""The ``bigface`` command.

Exit codes: 0 done, 2 the user's mistake (one line), 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

import sys
import traceback

from rich.console import Console
from rich.markup import escape

from fr_core.errors import RunStopped, UserError

from pipelines.cli import training, tune, knobs, data, shards, nets, compare, bench  # isort: skip  # noqa: F401  # the help's order
from pipelines.cli.app import app
from pipelines.cli.usage import UsageError, explain_usage
from pipelines.logs import log, log_style, start_logging, turn_output_into_events
from pipelines.signals import CTRL_C


def main() -> None:
    """Run the command line; turn mistakes of the user, SIGTERM and Ctrl-C into one line and an exit code.

    In a Ray job all output is JSON lines, tracebacks included.
    """
    events = False
    try:
        events = log_style() == "json"
        start_logging()
        if events:
            turn_output_into_events()
        sys.exit(app(standalone_mode=False, prog_name="bigface"))
    except UserError as error:
        show_mistake(str(error), events)
        sys.exit(2)
    except UsageError as error:
        if "Usage:" in str(error):  # the help of a command without arguments
            error.show()  # type: ignore[attr-defined]
        else:
            show_mistake(explain_usage(error, sys.argv[1:]), events)
        sys.exit(2)
    except RunStopped as stopped:
        if events:
            log.warning("%s", stopped)
        else:
            Console(stderr=True).print(f"bigface: {stopped}", highlight=False)
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(CTRL_C)
    except Exception as error:
        if not events:
            raise
        log.error("%s", type(error).__name__, extra={"facts": {"traceback": traceback.format_exc()}})
        sys.exit(1)


def show_mistake(text: str, events: bool) -> None:
    """Print a mistake of the user on standard error, in one line, or as an event."""
    if events:
        log.error("%s", text)
    else:
        Console(stderr=True).print(f"[red]bigface:[/] {escape(text)}", highlight=False, soft_wrap=True)
