"""Face recognition: a folder of photos in, a verified net out.

Exit codes: 0 done, 2 your mistake (one line says what is wrong and the mend), 130 Ctrl-C, 143 SIGTERM, 1 other errors.
"""

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
