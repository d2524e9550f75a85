"""Where data and runs lie: local paths, or any URL that pyarrow has a filesystem for (``s3://``, ``gs://``, …).

This is the one module that knows about URLs, with :mod:`fr_core.data.hub` for those of the hub (``hf://``). An object
store has neither rename nor append. So :func:`atomic_file` writes to a local scratch file and uploads it in one piece.
:func:`local_copy` downloads a file for readers that need a local one.
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

from fr_core.data import hub
from fr_core.errors import StorageError, UserError

T = TypeVar("T")
CHUNK = 16 * 2**20  # bytes that one request moves
PARALLEL_REQUESTS = 16  # an object store answers late, but serves many requests at a time
GCS_RETRY_SECONDS = 20  # pyarrow's default is 15 minutes
PAUSES = (1.0, 3.0)  # seconds between tries; within each try, pyarrow asks S3 every 0.2 s for 6 s
RAY_JOB_FOLDERS = "working_dir_files"  # Ray unpacks a submitted job's folder below a folder of this name
TRANSIENT = re.compile(r"NETWORK_CONNECTION|HTTP status (429|5\d\d)|SLOW_DOWN|THROTTLING|TIMEOUT|UNAVAILABLE|INTERNAL")


class Stat(NamedTuple):
    """The part of ``os.stat_result`` that object stores know."""

    st_mode: int
    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder at a URL: the part of :class:`pathlib.Path` that this program uses.

    Every method raises FileNotFoundError where ``Path`` does, and StorageError for all other failures.
    """

    anchor: str  # s3://bucket
    parts: tuple[str, ...]  # names below the anchor
    query: str = ""  # pyarrow's options, such as region=…&endpoint_override=…
    listed: Stat | None = field(default=None, compare=False, repr=False)  # known from the listing of its folder

    def __str__(self) -> str:
        return "/".join([self.anchor, *self.parts]) + (f"?{self.query}" if self.query else "")

    def __truediv__(self, below: str) -> "RemotePath":
        parts = (*self.parts, *(part for part in below.split("/") if part not in ("", ".")))
        return RemotePath(self.anchor, parts, self.query)

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.parts[-1] if self.parts else self.anchor.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Return the name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Return the last suffix of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """Return all suffixes of the name."""
        return PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> "RemotePath":
        """Return the folder that holds this path."""
        return RemotePath(self.anchor, self.parts[:-1], self.query)

    @property
    def parents(self) -> tuple["RemotePath", ...]:
        """Return all folders above this path, the nearest first."""
        return tuple(RemotePath(self.anchor, self.parts[:n], self.query) for n in reversed(range(len(self.parts))))

    def with_name(self, name: str) -> "RemotePath":
        """Return the path of another name in the same folder."""
        return self.parent / name

    def resolve(self) -> "RemotePath":
        """Return this path: a URL is always absolute."""
        return self

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """Return the path below a folder."""
        return PurePosixPath(*self.parts[len(folder.parts) :])

    @property
    def key(self) -> str:
        """Return the filesystem's name of this path: ``bucket/folder/name``."""
        return "/".join([_filesystem(self.anchor, self.query)[1].rstrip("/"), *self.parts])

    @property
    def filesystem(self) -> fs.FileSystem:
        """Return pyarrow's filesystem for this URL."""
        return _filesystem(self.anchor, self.query)[0]

    def stat(self) -> Stat:
        """Return the kind, size and time of the file, as its folder listed it or as the store answers."""
        if self.listed:
            return self.listed
        info = _ask_store(self, lambda: self.filesystem.get_file_info(self.key))
        if info.type == fs.FileType.NotFound:
            raise _missing(self)
        return _stat(info)

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self._mode() != 0

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return stat.S_ISREG(self._mode())

    def is_dir(self) -> bool:
        """Return whether there is a folder: a prefix of other names."""
        return stat.S_ISDIR(self._mode())

    def iterdir(self) -> Iterator["RemotePath"]:
        """Iterate over the files and folders in this folder."""
        return iter(self._below(recursive=False))

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        """Iterate over all paths below this folder whose name matches a pattern."""
        return (path for path in self._below(recursive=True) if fnmatchcase(path.name, pattern))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Iterate over the paths that match a pattern, such as ``*/*.parquet``."""
        first, *rest = pattern.split("/")
        if rest and not set("*?[") & set(first):
            return (self / first).glob("/".join(rest))
        depth = len(self.parts)
        wanted = [first, *rest]
        found = (path for path in self._below(recursive=bool(rest)) if len(path.parts) == depth + len(wanted))
        return (path for path in found if all(map(fnmatchcase, path.parts[depth:], wanted)))

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        return _ask_store(self, self._content)

    def read_text(self) -> str:
        """Read the whole file as UTF-8."""
        return self.read_bytes().decode()

    def open_random(self) -> pa.NativeFile:
        """Open the file to read ranges of it, from any thread."""
        return _ask_store(self, lambda: self.filesystem.open_input_file(self.key))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: an object store has names with slashes, not folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""
        try:
            _ask_store(self, lambda: self.filesystem.delete_file(self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _content(self) -> bytes:
        """Read the whole file, without retries."""
        with self.filesystem.open_input_stream(self.key) as stream:
            return stream.read()

    def _mode(self) -> int:
        """Return the kind of the path as a mode of ``os.stat``, 0 if there is nothing."""
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def _below(self, recursive: bool) -> list["RemotePath"]:
        """List this folder, with one request per thousand names. A missing folder is empty."""
        selector = fs.FileSelector(self.key, allow_not_found=True, recursive=recursive)
        found = _ask_store(self, lambda: self.filesystem.get_file_info(selector))
        start = len(self.key.rstrip("/")) + 1
        below = ((info, (*self.parts, *info.path[start:].rstrip("/").split("/"))) for info in found)
        return [RemotePath(self.anchor, parts, self.query, _stat(info)) for info, parts in below]


AnyPath = Path | RemotePath


class LocalBytes:
    """A local file to take slices of, like a memoryview. Reading instead of mapping leaves no pages in this process."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        self.length = os.fstat(self.file.fileno()).st_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.length)
        return os.pread(self.file.fileno(), max(stop - start, 0), start)


class RemoteBytes:
    """A remote file to take slices of, like a memoryview. Each slice is one request."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.file = path, path.open_random()
        self.length = self.file.size()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.length)
        return _ask_store(self.path, lambda: self.file.read_at(max(stop - start, 0), start))


def to_path(ref: str | AnyPath) -> AnyPath:
    """Make a path, remote if ``ref`` is a URL (``s3://bucket/folder?region=…``). The storage is not contacted.

    ``~`` at the start of a local path is the home folder.

    Raises:
        UserError: the URL names no bucket or dataset, or contains credentials.
    """
    if isinstance(ref, RemotePath):
        return ref
    if isinstance(ref, Path) or "://" not in ref:
        return Path(os.path.expanduser(ref))
    url, _, query = ref.partition("?")
    scheme, _, rest = url.partition("://")
    place, *parts = rest.split("/")
    if scheme == "file":
        return Path(f"/{'/'.join(parts)}")
    if re.search(":.*@", place):
        raise UserError(
            f"{scheme}://…@: URLs are printed and stored: put credentials into AWS_ACCESS_KEY_ID and the like"
        )
    if scheme == hub.SCHEME:
        return RemotePath(*hub.split_hub_url(ref))
    if not place:
        raise UserError(f"{ref}: no bucket in the URL; expected {scheme}://BUCKET/FOLDER")
    return RemotePath(f"{scheme}://{place}", tuple(part for part in parts if part), query)


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[Path]:
    """Provide a local file to write in the block and put it at ``path`` afterwards. So a file is complete or absent.

    Raises:
        OSError: a local path is not writable.
        StorageError: a remote path is not writable.
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
        _ask_store(path, partial(_copy_file, part, path.key, fs.LocalFileSystem(), path.filesystem))


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Provide a local file with the content of ``path``: the file itself, or a scratch copy during the block."""
    if isinstance(path, Path):
        yield path
        return
    with TemporaryDirectory(prefix="bigface-") as scratch:
        copy = Path(scratch) / path.name
        _ask_store(path, partial(_copy_file, path.key, copy, path.filesystem, fs.LocalFileSystem()))
        try:
            yield copy
        except UserError as error:  # name the URL instead of the scratch copy
            raise type(error)(str(error).replace(str(copy), str(path))) from None


@contextmanager
def explain_disk_errors(path: AnyPath) -> Iterator[None]:
    """Turn errors of the local disk (full, read-only, gone) into errors for the user.

    Raises:
        UserError: names the file that could not be written.
    """
    try:
        yield
    except OSError as error:
        named = str(error.filename or path).removesuffix(".part")
        raise UserError(f"cannot write {named}: {error.strerror or error}") from None


def refuse_job_folder(out: AnyPath) -> None:
    """Refuse to write outputs into the folder of a Ray job, a copy that Ray removes.

    Raises:
        UserError: ``out`` lies in such a folder, because its path was relative or missing.
    """
    if isinstance(out, Path) and RAY_JOB_FOLDERS in out.resolve().parts:
        raise UserError(f"{out}: Ray removes a job's folder: give an absolute path that all nodes see, or a URL")


def write_text_atomically(path: AnyPath, text: str) -> None:
    """Write a text file; it is complete or absent."""
    with atomic_file(path) as file:
        file.write_text(text)


def begin_job(
    out: AnyPath, marker: str, stamp: str, own: Iterable[str], overwrite: bool = False, beside: Iterable[str] = ()
) -> bool:
    """Make and mark the folder of a job, or find that the same job began there before.

    Args:
        out: folder of the job.
        marker: name of the file that holds the stamp of the job in this folder.
        stamp: what tells this job from others.
        own: patterns of the files that such jobs make. With ``overwrite`` they are deleted; other files stay.
        overwrite: whether a used folder is allowed.
        beside: names of files that may lie in the folder all the same.

    Returns:
        Whether the same job began here, so that its files may be used.

    Raises:
        UserError: the folder is not empty, or not writable.
    """
    try:
        if not overwrite and (out / marker).is_file() and (out / marker).read_text() == stamp:
            return True
        if out.exists() and not overwrite and any(entry.name not in beside for entry in out.iterdir()):
            raise UserError(f"{out} is not empty; --overwrite replaces the files of an earlier job in it")
        out.mkdir(parents=True, exist_ok=True)
        for pattern in own:
            for old in find_paths(out, pattern):
                old.unlink()
        write_text_atomically(out / marker, stamp)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return False


def find_paths(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return the paths that match a pattern, sorted by name."""
    paths: Iterable[AnyPath] = folder.glob(pattern)
    return sorted(paths, key=str)


def remove_folder(path: AnyPath) -> None:
    """Remove a folder and everything in it, if it exists."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        with suppress(FileNotFoundError):  # an earlier try deleted it, but its answer was lost
            _ask_store(path, lambda: path.filesystem.delete_dir(path.key))


def prefetch(calls: Iterable[Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """Yield the same calls in the same order; the next ``PARALLEL_REQUESTS`` of them already run in threads."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as threads:
        begun: deque[Future[T]] = deque()
        for call in calls:
            begun.append(threads.submit(call))
            if len(begun) == PARALLEL_REQUESTS:
                yield begun.popleft().result
        for future in begun:
            yield future.result


@lru_cache(maxsize=16)
def _filesystem(anchor: str, query: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a URL and its name for the anchor."""
    if anchor.startswith(f"{hub.SCHEME}:"):
        return hub.open_hub(anchor)
    if anchor.startswith(("gs:", "gcs:")) and "retry_limit_seconds" not in query:
        query = "&".join([*filter(None, [query]), f"retry_limit_seconds={GCS_RETRY_SECONDS}"])
    try:
        return fs.FileSystem.from_uri(f"{anchor}?{query}" if query else anchor)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise StorageError(f"{anchor}: {_reason(error)}") from None


def _ask_store(path: RemotePath, call: Callable[[], T], pauses: tuple[float, ...] = PAUSES) -> T:
    """Call the store, and retry passing failures after pauses. Errors name the URL in one line."""
    try:
        return call()
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, pa.ArrowException, *hub.hub_errors()) as error:
        if not pauses or not TRANSIENT.search(str(error)):
            raise StorageError(f"{path}: {_reason(error)}") from None
    time.sleep(pauses[0])
    return _ask_store(path, call, pauses[1:])


def _copy_file(source: AnyPath | str, target: AnyPath | str, there: fs.FileSystem, here: fs.FileSystem) -> None:
    """Copy a file from one filesystem to the other."""
    fs.copy_files(str(source), str(target), there, here, chunk_size=CHUNK)


def _missing(path: RemotePath) -> FileNotFoundError:
    """Make the error for a path that does not exist."""
    return FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def _stat(info: fs.FileInfo) -> Stat:
    """Convert pyarrow's facts about a file."""
    mode = stat.S_IFDIR if info.type == fs.FileType.Directory else stat.S_IFREG
    return Stat(mode, info.size or 0, info.mtime_ns or 0)


def _reason(error: Exception) -> str:
    """Return the first line of a store's error, without the key (the URL names it) and the store's internal details."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^When .*?: (?=AWS)| \(Request ID.*| error_info=.*", "", first)
