"""Zip and tar archives of photos, read without unpacking. So no path in an archive can lead outside."""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fr_core.data.store import LocalBytes, RemoteBytes
from fr_core.errors import UserError

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # before the bytes of each zip member
LOCAL_MAGIC = b"PK\3\4"
AGAIN = "copy it again, or pack it anew"
ENCRYPTED, CHECKSUM_BEHIND, UTF8 = 0x1, 0x8, 0x800  # flags of a header


@dataclass(frozen=True)
class Member:
    """A file in an archive; ``start`` points to a tar member's bytes, or to a zip member's local header."""

    name: str
    start: int
    length: int  # bytes in the archive


def zip_members(path: Path, names_in: str | None = None) -> Iterator[Member]:
    """Yield the files of a zip archive, from its central directory. Backslashes in names become slashes.

    Args:
        path: the archive.
        names_in: encoding of names that the archive does not mark as UTF-8.

    Raises:
        UserError: the file is unreadable or no zip archive, or the encoding of a name is not known.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not 0 <= info.header_offset <= size or not 0 <= info.compress_size <= size:
                    raise ValueError(f"{info.filename!r} lies outside the file")
                if not info.filename.endswith(("/", "\\")):
                    yield Member(_zip_name(path, info, names_in), info.header_offset, info.compress_size)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{path}: not a readable zip archive: {_first_line(error)}; {AGAIN}") from None


def _zip_name(path: Path, info: zipfile.ZipInfo, names_in: str | None) -> str:
    """Return the name of a zip member; a name that is not marked as UTF-8 may still be."""
    name = info.filename
    if not info.flag_bits & UTF8 and not name.isascii():
        try:
            name = name.encode("cp437").decode(names_in or "utf-8")
        except UnicodeError:
            mend = f"they are not {names_in}" if names_in else "give --names-in gbk, shift_jis, cp1252 or the like"
            raise UserError(f"{path}: its names are in no stated encoding; {mend}") from None
        except LookupError:
            raise UserError(f"--names-in {names_in}: no encoding of this name; use gbk, shift_jis or cp1252") from None
    return name.replace("\\", "/")


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar archive.

    Raises:
        UserError: the file is unreadable, compressed, truncated, damaged, or no tar archive.
    """
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            end = 0
            while (info := archive.next()) is not None:
                if info.size < 0 or archive.offset <= end:  # some versions of tarfile loop on this
                    raise ValueError(f"damaged at byte {info.offset}")
                end = archive.offset
                if info.isreg() and not info.issparse():
                    yield Member(info.name, info.offset_data, info.size)
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
            # tarfile stops silently at a damaged header, so only zeros may follow the last member.
            file.seek(end)
            while block := file.read(2**20):
                if block.strip(b"\0"):
                    raise ValueError(f"damaged after byte {end}, or several archives in one file")
    except (OSError, ValueError, tarfile.TarError, OverflowError, RecursionError, MemoryError) as error:
        mend = AGAIN if path.suffix.lower() == ".tar" else "decompress it first, since images do not compress further"
        raise UserError(f"{path}: not a readable tar archive: {_first_line(error)}; {mend}") from None


def read_zip_member(data: memoryview | LocalBytes | RemoteBytes, start: int, length: int, longest: int) -> bytes:
    """Read one file of a zip archive and inflate it.

    Args:
        data: bytes of the archive.
        start: offset of the member's local header.
        length: bytes of the member in the archive.
        longest: limit in bytes; larger files are refused, whatever their headers say.

    Raises:
        ValueError: the member is damaged, encrypted, too large, or not compressed by deflate.
    """
    header = bytes(data[start : start + LOCAL_HEADER.size])
    if len(header) < LOCAL_HEADER.size:
        raise ValueError("truncated archive")
    magic, _, flags, method, _, _, checksum, _, _, name, extra = LOCAL_HEADER.unpack(header)
    begin = start + LOCAL_HEADER.size + name + extra
    if length > longest:
        raise ValueError("too large")
    packed = data[begin : begin + length]
    if magic != LOCAL_MAGIC or len(packed) < length:
        raise ValueError("damaged archive")
    if flags & ENCRYPTED:
        raise ValueError("encrypted: unpack the archive first")
    if method == zipfile.ZIP_STORED:
        content = bytes(packed)
    elif method == zipfile.ZIP_DEFLATED:
        content = _inflate(packed, longest)
    else:
        raise ValueError("compressed by another method than deflate: unpack the archive first")
    if not flags & CHECKSUM_BEHIND and zlib.crc32(content) != checksum:
        raise ValueError("damaged archive")
    return content


def _inflate(packed: memoryview | bytes, longest: int) -> bytes:
    """Inflate raw deflate data of at most ``longest`` bytes."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(packed, longest)
    except zlib.error:
        raise ValueError("damaged archive") from None
    if not inflate.eof:
        raise ValueError("too large" if len(content) == longest else "damaged archive")
    return content


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]
