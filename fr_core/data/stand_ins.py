"""What lies in place of a file that was never fetched: a pointer of Git LFS, or a web page that tells why not."""

from collections.abc import Iterable
from pathlib import Path

from fr_core.data.store import AnyPath
from fr_core.errors import UserError

HEAD = 64  # bytes at the start of a file, which tell
STAND_INS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<!doctype html": "a web page, not the file itself: download it again",
    b"<?xml": "an error message of a server, not the file itself: download it again",
    b"<html": "a web page, not the file itself: download it again",
}


def stand_in(start: bytes) -> str | None:
    """Return what a file is and the mend, if its first bytes are those of a stand-in."""
    begins = start.lstrip().lower()
    return next((what for key, what in STAND_INS.items() if begins.startswith(key)), None)


def refuse_stand_ins(paths: Iterable[AnyPath]) -> None:
    """Refuse local files that are stand-ins.

    Raises:
        UserError: a file is one.
    """
    for path in paths:
        if not isinstance(path, Path) or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                start = file.read(HEAD)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if what := stand_in(start):
            raise UserError(f"{path}: {what}")
