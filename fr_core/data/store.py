"""Where data and runs lie: local paths, or any URL that pyarrow has a filesystem for (``s3://``, ``gs://``, …).

The one room that knows about URLs. An object store has neither rename nor append: a file is made in local scratch
(:func:`written`), put up in one piece, and brought to local scratch for what reads only local files (:func:`fetched`).
"""

import errno
import os
import re
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from fr_core.errors import StorageError, UserError

T = TypeVar("T")
CHUNK = 16 * 2**20  # bytes that one request moves
AT_ONCE = 16  # requests: an object store answers late, but many at a time
GCS_RETRY_SECONDS = 20  # pyarrow's own are 15 minutes
PAUSES = (1.0, 3.0)  # seconds between tries; within each, pyarrow asks S3 every 0.2 s for 6 s
JOB_COPIES = "working_dir_files"  # where Ray unpacks the folder that a job was submitted with
PASSING = re.compile(r"NETWORK_CONNECTION|HTTP status (429|5\d\d)|SLOW_DOWN|THROTTLING|TIMEOUT|UNAVAILABLE|INTERNAL")


class Stat(NamedTuple):
    """The part of ``os.stat_result`` that object stores know."""

    st_mode: int
    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder at a URL: as much of :class:`pathlib.Path` as this program uses.

    Every method raises FileNotFoundError where ``Path`` does, and for whatever else fails StorageError.
    """

    anchor: str  # s3://bucket
    parts: tuple[str, ...]  # below it
    query: str = ""  # pyarrow's options, such as region=…&endpoint_override=…
    listed: Stat | None = field(default=None, compare=False, repr=False)  # by the folder that it was found in

    def __str__(self) -> str:
        return "/".join([self.anchor, *self.parts]) + (f"?{self.query}" if self.query else "")

    def __truediv__(self, below: str) -> "RemotePath":
        parts = (*self.parts, *(part for part in below.split("/") if part not in ("", ".")))
        return RemotePath(self.anchor, parts, self.query)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else self.anchor.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.anchor, self.parts[:-1], self.query)

    @property
    def parents(self) -> tuple["RemotePath", ...]:
        return tuple(RemotePath(self.anchor, self.parts[:n], self.query) for n in reversed(range(len(self.parts))))

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def resolve(self) -> "RemotePath":
        return self

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        return PurePosixPath(*self.parts[len(folder.parts) :])

    @property
    def key(self) -> str:
        """What the filesystem calls it: ``bucket/folder/name``."""
        return "/".join([_filesystem(self.anchor, self.query)[1].rstrip("/"), *self.parts])

    @property
    def filesystem(self) -> fs.FileSystem:
        return _filesystem(self.anchor, self.query)[0]

    def stat(self) -> Stat:
        if self.listed:
            return self.listed
        info = _asked(self, lambda: self.filesystem.get_file_info(self.key))
        if info.type == fs.FileType.NotFound:
            raise _missing(self)
        return _stat(info)

    def exists(self) -> bool:
        return self._mode() != 0

    def is_file(self) -> bool:
        return stat.S_ISREG(self._mode())

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self._mode())

    def iterdir(self) -> Iterator["RemotePath"]:
        return iter(self._below(recursive=False))

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        return (path for path in self._below(recursive=True) if fnmatchcase(path.name, pattern))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        first, *rest = pattern.split("/")
        if rest and not set("*?[") & set(first):
            return (self / first).glob("/".join(rest))
        depth = len(self.parts)
        wanted = [first, *rest]
        found = (path for path in self._below(recursive=bool(rest)) if len(path.parts) == depth + len(wanted))
        return (path for path in found if all(map(fnmatchcase, path.parts[depth:], wanted)))

    def read_bytes(self) -> bytes:
        return _asked(self, self._content)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open_random(self) -> pa.NativeFile:
        """For reads of ranges, from any thread."""
        return _asked(self, lambda: self.filesystem.open_input_file(self.key))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object store has names with slashes, not folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _asked(self, lambda: self.filesystem.delete_file(self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _content(self) -> bytes:
        with self.filesystem.open_input_stream(self.key) as stream:
            return stream.read()

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def _below(self, recursive: bool) -> list["RemotePath"]:
        """What lies in this folder; one request a thousand names. Nothing where there is no such folder."""
        selector = fs.FileSelector(self.key, allow_not_found=True, recursive=recursive)
        found = _asked(self, lambda: self.filesystem.get_file_info(selector))
        start = len(self.key.rstrip("/")) + 1
        below = ((info, (*self.parts, *info.path[start:].rstrip("/").split("/"))) for info in found)
        return [RemotePath(self.anchor, parts, self.query, _stat(info)) for info, parts in below]


AnyPath = Path | RemotePath


class LocalBytes:
    """A local file to take slices of, as of a memoryview; read, not mapped, so that no page of it stays with us."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        self.length = os.fstat(self.file.fileno()).st_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.length)
        return os.pread(self.file.fileno(), max(stop - start, 0), start)


class RemoteBytes:
    """A remote file to take slices of, as of a memoryview; each is a request of its own."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.file = path, path.open_random()
        self.length = self.file.size()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.length)
        return _asked(self.path, lambda: self.file.read_at(max(stop - start, 0), start))


def to_path(ref: str | AnyPath) -> AnyPath:
    """A path, or where ``ref`` is a URL (``s3://bucket/folder?region=…``), a remote one. Nothing is asked of it yet.

    Raises:
        UserError: no bucket, or credentials in the URL.
    """
    if isinstance(ref, Path | RemotePath) or "://" not in ref:
        return ref if isinstance(ref, RemotePath) else Path(ref)
    url, _, query = ref.partition("?")
    scheme, _, rest = url.partition("://")
    place, *parts = rest.split("/")
    if scheme == "file":
        return Path(f"/{'/'.join(parts)}")
    if re.search(":.*@", place):
        raise UserError(
            f"{scheme}://…@: a URL is printed and stored: credentials go into AWS_ACCESS_KEY_ID and the like"
        )
    if not place:
        raise UserError(f"{ref}: no bucket in it; expected {scheme}://BUCKET/FOLDER")
    return RemotePath(f"{scheme}://{place}", tuple(part for part in parts if part), query)


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[Path]:
    """A local file to write in the block, which then stands at ``path``, so that a file is whole or absent.

    Raises:
        OSError: a local place that cannot be written.
        StorageError: a remote one.
    """
    if isinstance(path, Path):
        part = path.with_name(path.name + ".part")
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return
    with TemporaryDirectory(prefix="bigface-") as scratch:
        part = Path(scratch) / path.name
        yield part
        _asked(path, partial(_copied, part, path.key, fs.LocalFileSystem(), path.filesystem))


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A local file with the content of ``path``: itself, or a copy in scratch for as long as the block lasts."""
    if isinstance(path, Path):
        yield path
        return
    with TemporaryDirectory(prefix="bigface-") as scratch:
        copy = Path(scratch) / path.name
        _asked(path, partial(_copied, path.key, copy, path.filesystem, fs.LocalFileSystem()))
        try:
            yield copy
        except UserError as error:  # say where it lies, not where it was looked at
            raise type(error)(str(error).replace(str(copy), str(path))) from None


@contextmanager
def explain_disk_errors(path: AnyPath) -> Iterator[None]:
    """Errors of the local disk as the user's: full, read-only, gone.

    Raises:
        UserError: names what could not be written.
    """
    try:
        yield
    except OSError as error:
        named = str(error.filename or path).removesuffix(".part")
        raise UserError(f"cannot write {named}: {error.strerror or error}") from None


def refuse_job_folder(out: AnyPath) -> None:
    """Raises: UserError: a Ray job's own folder, a copy that Ray removes: an output's path was relative or left out."""
    if isinstance(out, Path) and JOB_COPIES in out.resolve().parts:
        raise UserError(
            f"{out}: a Ray job's folder is a copy that is removed: give an absolute path that all nodes see, or a URL"
        )


def write_text_atomically(path: AnyPath, text: str) -> None:
    with atomic_file(path) as file:
        file.write_text(text)


def begin_job(
    out: AnyPath, marker: str, stamp: str, own: Iterable[str], overwrite: bool = False, beside: Iterable[str] = ()
) -> bool:
    """Makes the folder of a job and marks it, or finds that the same job was begun in it.

    Args:
        marker: the file that says by ``stamp`` which job was begun.
        own: patterns of the files that such jobs make: replaced where ``overwrite`` says so; others are left alone.
        beside: what may lie there all the same.

    Returns:
        Whether the same job was begun, so that what it left may be used.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    try:
        if not overwrite and (out / marker).is_file() and (out / marker).read_text() == stamp:
            return True
        if out.exists() and not overwrite and any(entry.name not in beside for entry in out.iterdir()):
            raise UserError(f"{out} is not empty; --overwrite replaces what such a job made in it")
        out.mkdir(parents=True, exist_ok=True)
        for pattern in own:
            for old in find_paths(out, pattern):
                old.unlink()
        write_text_atomically(out / marker, stamp)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return False


def find_paths(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """What a pattern matches, in the order of the names."""
    paths: Iterable[AnyPath] = folder.glob(pattern)
    return sorted(paths, key=str)


def remove_folder(path: AnyPath) -> None:
    """Removes a folder and all in it, if it is there."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        with suppress(FileNotFoundError):  # the try before did it, and its answer was lost
            _asked(path, lambda: path.filesystem.delete_dir(path.key))


def prefetch(calls: Iterable[Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """The same calls in the same order, of which the next ``AT_ONCE`` have begun in threads."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        begun: deque[Future[T]] = deque()
        for call in calls:
            begun.append(threads.submit(call))
            if len(begun) == AT_ONCE:
                yield begun.popleft().result
        for future in begun:
            yield future.result


@lru_cache(maxsize=16)
def _filesystem(anchor: str, query: str) -> tuple[fs.FileSystem, str]:
    """The filesystem, and what it calls the anchor."""
    if anchor.startswith(("gs:", "gcs:")) and "retry_limit_seconds" not in query:
        query = "&".join([*filter(None, [query]), f"retry_limit_seconds={GCS_RETRY_SECONDS}"])
    try:
        return fs.FileSystem.from_uri(f"{anchor}?{query}" if query else anchor)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise StorageError(f"{anchor}: {_reason(error)}") from None


def _asked(path: RemotePath, call: Callable[[], T], pauses: tuple[float, ...] = PAUSES) -> T:
    """What a call to the store returns, tried again after pauses where it may. Errors name the URL in one line."""
    try:
        return call()
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, pa.ArrowException) as error:
        if not pauses or not PASSING.search(str(error)):
            raise StorageError(f"{path}: {_reason(error)}") from None
    time.sleep(pauses[0])
    return _asked(path, call, pauses[1:])


def _copied(source: AnyPath | str, target: AnyPath | str, there: fs.FileSystem, here: fs.FileSystem) -> None:
    fs.copy_files(str(source), str(target), there, here, chunk_size=CHUNK)


def _missing(path: RemotePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def _stat(info: fs.FileInfo) -> Stat:
    mode = stat.S_IFDIR if info.type == fs.FileType.Directory else stat.S_IFREG
    return Stat(mode, info.size or 0, info.mtime_ns or 0)


def _reason(error: Exception) -> str:
    """Without the key, which the URL has, and what only the store's makers read."""
    return re.sub(r"^When .*?: (?=AWS)| \(Request ID.*| error_info=.*", "", str(error).strip().splitlines()[0])
