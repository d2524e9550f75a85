"""How a run was started: by which command and recipe, from which commit, on which machine, and by whom."""

import getpass
import shlex
import socket
import subprocess
import sys
from json import dumps
from pathlib import Path

from fr_core.data.store import AnyPath, write_text_atomically
from fr_core.train.page import ORIGIN

OWN_PROGRAMS = ("bigface", "__main__.py", "cli.py")


def origin_of(recipe: str) -> dict[str, str]:
    """Return how this process was started. Each fact is empty where the machine does not tell it."""
    program, *words = sys.argv
    name = "bigface" if Path(program).name in OWN_PROGRAMS else program
    facts = {"command": shlex.join([name, *words]), "recipe": recipe, "commit": commit()}
    return facts | {"host": socket.gethostname(), "user": _user()}


def write_origin(origin: dict[str, str], out: AnyPath) -> None:
    """Save how a run was started in the run's folder, where its MLflow page and people read it."""
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / ORIGIN, dumps(origin, indent=1) + "\n")


def commit() -> str:
    """Return the short commit of the source tree that runs, or "" outside of a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
