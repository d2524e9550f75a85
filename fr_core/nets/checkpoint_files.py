"""The files of a checkpoint: what is in them, how they are written, checked and read.

``checkpoints/step_00001000/`` holds

- ``backbone.safetensors``: what is verified and shipped, the moving average if there is one;
- ``backbone_state_RANK.safetensors``: the backbone's optimiser (in one file unless the ranks share it out), the raw
  weights where something else is shipped, a momentum encoder, an adapter to a teacher's width, and the thresholds of
  quantface beside a class matrix;
- ``head_RANK.safetensors``: a rank's rows of the class matrix and of their optimiser. Tensors of the head that are the
  same on all ranks stand in the first file alone, as do the centres or thresholds in a class matrix's place;
- ``identities.parquet``: whose rows they are;
- ``checkpoint.json``, written last: steps, config, sizes and checksums of the others, and its own. A folder without it
  is no checkpoint, on a disk as on an object store, where nothing can be renamed.

Legend: S rows of a class matrix, D embedding.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fr_core.data.schema import sha256
from fr_core.data.store import AnyPath, atomic_file, find_paths, local_copy, to_path
from fr_core.errors import UserError

FORMAT = 1
CHECKPOINTS = "checkpoints/step_" + "[0-9]" * 8 + "/checkpoint.json"  # of a run; unfinished ones are named otherwise
BACKBONE, IDENTITIES = "backbone.safetensors", "identities.parquet"

Summary = dict[str, Any]  # the content of checkpoint.json


class Damaged(UserError):
    """A checkpoint that is not as it was written; the one before may be."""


# Where checkpoints are


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoints(run: AnyPath) -> list[AnyPath]:
    """Whole checkpoints of a run, oldest first: ``checkpoint.json`` is there and its files have their sizes."""
    return [path.parent for path in find_paths(run, CHECKPOINTS) if is_whole(path.parent)]


def find_checkpoint(folder: AnyPath) -> AnyPath:
    """The folder itself if it is a checkpoint, else the newest one of a run whose backbone is whole.

    Raises:
        UserError: neither.
    """
    if (folder / "checkpoint.json").is_file():
        return folder
    for path in reversed(find_paths(folder, CHECKPOINTS)):
        if is_whole(path.parent, [BACKBONE]):
            return path.parent
    raise UserError(f"{folder}: no checkpoint there")


def is_whole(checkpoint: AnyPath, names: list[str] | None = None) -> bool:
    """Whether these files of a checkpoint (None: all) have the sizes that its ``checkpoint.json`` lists."""
    try:
        files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
        sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
        return all(sizes.get(name) == files[name]["bytes"] for name in names or files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def weights_file(ref: str | AnyPath) -> AnyPath:
    """The weights of a run, of a checkpoint, or the file itself.

    Raises:
        UserError: a folder without a checkpoint, or weights that are not as they were written.
    """
    path = to_path(ref)
    if not path.is_dir():
        return path
    folder = find_checkpoint(path)
    try:
        with checked(folder, read_summary(folder), BACKBONE):
            return folder / BACKBONE
    except Damaged as error:
        raise UserError(f"{error}: name an older checkpoint of the run, or --resume it") from None


# Writing


def write_tensors(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, int | str]:
    """Writes a safetensors file; returns its size and checksum, for ``checkpoint.json``."""
    with atomic_file(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        return _size_and_checksum(part)


def copy_file(source: AnyPath, path: AnyPath) -> dict[str, int | str]:
    """Copies a file; returns as :func:`write_tensors`."""
    with local_copy(source) as local, atomic_file(path) as part:
        shutil.copyfile(local, part)
        return _size_and_checksum(part)


def write_signed(folder: AnyPath, summary: Summary) -> None:
    """Writes ``checkpoint.json`` with its own checksum; on a local disk it is there for good, whatever happens next."""
    with atomic_file(folder / "checkpoint.json") as part, part.open("w") as file:
        file.write(json.dumps(summary | {"sha256": digest(summary)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if isinstance(folder, Path):
        for place in (folder, folder.parent):
            entry = os.open(place, os.O_RDONLY)
            os.fsync(entry)
            os.close(entry)


def digest(summary: Summary) -> str:
    """What ``checkpoint.json`` says of itself."""
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def _size_and_checksum(part: Path) -> dict[str, int | str]:
    return {"bytes": part.stat().st_size, "sha256": sha256(part)}


# Reading


def read_summary(checkpoint: AnyPath) -> Summary:
    """The content of ``checkpoint.json``. Raises: Damaged: it is not what was written."""
    path = checkpoint / "checkpoint.json"
    try:
        summary = json.loads(path.read_text())
        signature = summary.pop("sha256", None)  # older ones have none
        summary["format"], summary["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{path}: not readable") from None
    if signature not in (None, digest(summary)):
        raise Damaged(f"{path}: wrong checksum")
    return summary


@contextmanager
def checked(checkpoint: AnyPath, summary: Summary, name: str) -> Iterator[Path]:
    """A file of a checkpoint on the local disk, compared with its checksum.

    Raises:
        Damaged: it differs or is missing; names it.
    """
    try:
        with local_copy(checkpoint / name) as file:
            if sha256(file) != summary["files"].get(name, {}).get("sha256"):
                raise Damaged(f"{checkpoint / name}: wrong checksum")
            yield file
    except FileNotFoundError:
        raise Damaged(f"{checkpoint / name}: missing") from None


def read_tensors(folder: AnyPath, summary: Summary, name: str) -> dict[str, Tensor]:
    """All tensors of a file."""
    with checked(folder, summary, name) as file:
        return load_file(file)


def read_head(
    folder: AnyPath, summary: Summary, lo: int, hi: int, common: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A head's tensors as a rank with the rows [lo, hi) needs them, whatever ranks wrote them.

    Args:
        common: names of tensors that all ranks have alike, which the first file holds; all others lie by rows.

    Returns:
        The rows, and the common tensors.
    """
    pieces: dict[str, list[Tensor]] = {}
    for part in summary["head"]:
        first, last = part["rows"]
        if not (first < hi and lo < last):
            continue
        with checked(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
            for name in set(file.keys()) - set(common):
                rows = file.get_slice(name)[max(lo - first, 0) : min(hi, last) - first]
                pieces.setdefault(name, []).append(rows)
    same: dict[str, Tensor] = {}
    if common:
        with checked(folder, summary, summary["head"][0]["file"]) as local, safe_open(local, "pt") as file:
            same = {name: file.get_tensor(name) for name in common}
    return {name: torch.cat(rows) for name, rows in pieces.items()}, same


def known_rows(folder: AnyPath, classes_S: Tensor) -> Tensor:
    """Rows of a checkpoint's class matrix: float32 [S, D]. The class −1 has zeros.

    Args:
        classes_S: int64, classes of that checkpoint.
    """
    summary = read_summary(folder)
    found: Tensor | None = None
    for part in summary["head"]:
        first, last = part["rows"]
        here_S = (classes_S >= first) & (classes_S < last)
        if found is not None and not here_S.any():
            continue
        with checked(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
            rows = file.get_tensor("weight")
            found = torch.zeros(len(classes_S), rows.shape[1]) if found is None else found
            found[here_S] = rows[classes_S[here_S] - first]
    assert found is not None  # a class matrix has one part at least
    return found


def read_identities(folder: AnyPath) -> tuple[list[str], int]:
    """Names of the identities that a checkpoint's class matrix was trained on, and the variants of each.

    Raises:
        UserError: the checkpoint has no class matrix.
    """
    summary = read_summary(folder)
    if IDENTITIES not in summary["files"]:
        raise UserError(f"{folder}: no names of identities in it: its run had no class matrix, or is an old one")
    with checked(folder, summary, IDENTITIES) as local:
        names = pq.read_table(local, columns=["name"])["name"].to_pylist()
    return names, summary["config"]["data"].get("variants", 1)
