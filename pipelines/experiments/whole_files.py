"""A local file system whose files appear whole or not at all. Ray Tune saves the state of a search on it.

Tune copies its state to the search's folder about each second: it empties a file, then writes. A search that is killed
in between would lose all its trials.
"""

import os
from io import BufferedWriter, FileIO
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem  # Ray Data brings fsspec
from pyarrow.fs import FSSpecHandler, PyFileSystem


def whole_files() -> PyFileSystem:
    """Return the file system."""
    return PyFileSystem(_WholeFiles(LocalFileSystem()))


class _WholeFiles(FSSpecHandler):
    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        """Open a file that takes its place when it is closed."""
        return pa.PythonFile(_Whole(path), mode="w")


class _Whole(BufferedWriter):
    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(FileIO(f"{path}.part", "w"))

    def close(self) -> None:
        if not self.closed:
            super().close()  # raises where the disk is full
            os.replace(f"{self.path}.part", self.path)
