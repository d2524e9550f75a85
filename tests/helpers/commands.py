"""The command line in this process."""

import json

from typer.testing import CliRunner

from pipelines.cli import app


def bigface(*args):
    """Runs a command in this process; the user's mistakes surface as UserError."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def figures(path):
    content = json.loads(path.read_text())
    assert {"command", "version", "machine", "figures"} <= set(content)
    return content["figures"]
