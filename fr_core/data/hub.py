"""Datasets on the Hugging Face hub, ``hf://datasets/OWNER/NAME[@REVISION][/PATH]``, as a filesystem of pyarrow.

``huggingface_hub`` reads the token, and where the hub is, from the environment: HF_TOKEN, HF_ENDPOINT.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pyarrow as pa
from pyarrow import fs

from fr_core.errors import StorageError, UserError

SCHEME = "hf"
FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH]"
PLACE = re.compile(r"datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/@]+|[^/@]+))?(?P<path>/.*)?")
REVISION_BEHIND = re.compile(r"(?P<path>[^@]*)@(?P<revision>refs/(convert|pr)/[^/@]+|[^/@]+)")
SLASH = "%2F"  # in a revision, whose name the hub's library takes as one part of a path
DAMAGES = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of the hub's answers
SECONDS = 20  # to wait for the hub's first answer


def split_hub_url(ref: str) -> tuple[str, tuple[str, ...]]:
    """Split a URL of the hub into its dataset, ``hf://datasets/OWNER/NAME@REVISION``, and the names below it.

    The revision may also stand at the end, behind the path.

    Raises:
        UserError: the URL has another form.
    """
    found = PLACE.fullmatch(ref.removeprefix(f"{SCHEME}://").rstrip("/"))
    if not found:
        raise UserError(f"{ref}: only datasets are read from the hub; expected {FORM}")
    revision, path = found["revision"], found["path"] or ""
    if not revision and (behind := REVISION_BEHIND.fullmatch(path)):
        revision, path = behind["revision"], behind["path"]
    place = f"{SCHEME}://datasets/{found['name']}" + (f"@{revision.replace('/', SLASH)}" if revision else "")
    return place, tuple(part for part in path.split("/") if part)


def open_hub(place: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a dataset on the hub, and the dataset's name in it.

    Raises:
        UserError: ``huggingface_hub`` is not installed.
        StorageError: there is no such dataset or revision, it may not be read, or the hub does not answer.
    """
    try:
        from huggingface_hub import HfApi, HfFileSystem, errors
    except ImportError:
        raise UserError(f"{place}: to read from the hub, pip install 'bigface[hub]'") from None
    endpoint = os.environ.get("HF_ENDPOINT")
    key = place.removeprefix(f"{SCHEME}://")
    name, _, revision = key.removeprefix("datasets/").partition("@")
    try:
        HfApi(endpoint=endpoint).repo_info(
            name, repo_type="dataset", revision=revision.replace(SLASH, "/") or None, timeout=SECONDS
        )
    except errors.GatedRepoError:
        reason = "its owner grants access; ask for it on the dataset's page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "no such dataset, or a private one; check the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "the dataset has no such revision; leave it out for the newest"
    except errors.OfflineModeIsEnabled:
        reason = "the hub is switched off by HF_HUB_OFFLINE; unset it"
    except (OSError, ValueError, errors.HTTPError) as error:
        reason = f"the hub does not answer: {(str(error) or type(error).__name__).splitlines()[0]}"
    else:
        return fs.PyFileSystem(_Handler(HfFileSystem(endpoint=endpoint, skip_instance_cache=True))), key
    raise StorageError(f"{place}: {reason}")


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the network errors of the hub's library that are no OSError; none before the hub was opened."""
    library = sys.modules.get("huggingface_hub.errors")
    return (library.HTTPError,) if library else ()


@contextmanager
def _answers() -> Iterator[None]:
    """Turn what the hub's library raises over an answer in another form, such as a proxy's page, into an OSError."""
    try:
        yield
    except DAMAGES as error:
        raise OSError(f"the hub's answer is damaged: {str(error) or type(error).__name__}") from None


class _Handler(fs.FSSpecHandler):
    """pyarrow's bridge to the hub: failures are raised instead of taken for missing files, and nothing is written."""

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """List a folder."""
        depth = None if selector.recursive else 1
        try:
            with _answers():
                found = self.fs.find(selector.base_dir, maxdepth=depth, withdirs=True, detail=True)
                below = selector.base_dir.rstrip("/") + "/"
                return [self._create_file_info(path, info) for path, info in found.items() if path.startswith(below)]
        except FileNotFoundError:
            if not selector.allow_not_found:
                raise
            return []

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Return what the hub says about files and folders."""
        with _answers():
            infos: list[fs.FileInfo] = super().get_file_info(paths)
        return infos

    def open_input_file(self, path: str) -> pa.PythonFile:
        """Open a file to read ranges of it."""
        with _answers():
            return pa.PythonFile(self.fs.open(path, "rb"), mode="r")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """Open a file to read it from its start."""
        return self.open_input_file(path)

    def _refuse(self, *_: object) -> NoReturn:
        """Refuse to change the hub."""
        raise PermissionError("datasets on the hub are only read; give a folder or a bucket to write to")

    open_output_stream = open_append_stream = delete_file = delete_dir = delete_dir_contents = _refuse
    create_dir = move = copy_file = delete_root_dir_contents = _refuse
