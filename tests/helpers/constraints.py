"""The versions that head, workers, image and CI share; ``make constraints`` writes them to ``constraints.txt``."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
HEADER = """\
# The versions that were tested together, of bigface and all its extras. `make constraints` writes this file.
# Machines of a cluster must not differ, so all of them install with `pip install -c constraints.txt`.
"""


def asked() -> Iterator[Requirement]:
    """Yield what ``pyproject.toml`` asks for, with and without extras, but bigface itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (one for one in map(Requirement, lines) if one.name != project["name"])


def installed() -> dict[str, str]:
    """Find the versions of all that is asked for, and of what that asks for in turn, in this environment."""
    found: dict[str, str] = {}
    queue, seen = list(asked()), set[tuple[str, str]]()
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        new = {(name, extra) for extra in ("", *wanted.extras)} - seen
        seen |= new
        try:
            package = distribution(name)
        except PackageNotFoundError:  # such as a library for CUDA, where PyTorch is the build for CPUs
            continue
        found[name] = Version(package.version).public  # without the build, such as +cpu
        more = [Requirement(line) for line in package.requires or ()]
        queue += [one for one in more for _, extra in new if not one.marker or one.marker.evaluate({"extra": extra})]
    return found


if __name__ == "__main__":
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(installed().items())))
