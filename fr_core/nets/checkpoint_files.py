"""The files of a checkpoint: how they are written, verified and read (docs/checkpoints.md).

``checkpoints/step_00001000/`` holds

- ``backbone.safetensors``: the weights that are verified and shipped. They are the moving average if the run has one.
- ``backbone_state_RANK.safetensors``: the backbone's optimiser and other tensors of training. Some methods have a
  momentum encoder, an adapter to a teacher's width, or quantface's thresholds beside a class matrix. The raw weights
  are here if a moving average is shipped. There is one file, unless the ranks shard the optimiser.
- ``head_RANK.safetensors``: a rank's rows of the class matrix and of its optimiser. The first file alone holds
  tensors that all ranks share. They may be the centres or thresholds of a head without a class matrix.
- ``identities.parquet``: names of the identities, in the order of the class matrix's rows.
- ``checkpoint.json``, written last: steps, config, the sizes and checksums of the other files, and its own checksum.
  A folder without this file is no checkpoint. So object stores, which cannot rename, need no other rule than disks.

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
CHECKPOINTS = "checkpoints/step_" + "[0-9]" * 8 + "/checkpoint.json"  # pattern below a run's folder
BACKBONE, IDENTITIES = "backbone.safetensors", "identities.parquet"

Summary = dict[str, Any]  # the content of checkpoint.json


class DamagedCheckpoint(UserError):
    """A checkpoint whose files changed after they were written. The checkpoint before it may be intact."""


# Where checkpoints are


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:08d}"


def checkpoints(run: AnyPath) -> list[AnyPath]:
    """List the whole checkpoints of a run, oldest first: all files have the sizes that ``checkpoint.json`` lists."""
    return [path.parent for path in find_paths(run, CHECKPOINTS) if is_whole(path.parent)]


def find_checkpoint(folder: AnyPath) -> AnyPath:
    """Return the folder if it is a checkpoint, else the newest checkpoint below it whose backbone is whole.

    Raises:
        UserError: The folder is no checkpoint and no run that has one.
    """
    if (folder / "checkpoint.json").is_file():
        return folder
    for path in reversed(find_paths(folder, CHECKPOINTS)):
        if is_whole(path.parent, [BACKBONE]):
            return path.parent
    raise UserError(f"{folder}: no checkpoint there: give the folder of a run or of a checkpoint")


def is_whole(checkpoint: AnyPath, names: list[str] | None = None) -> bool:
    """Return whether files of a checkpoint (None: all) have the sizes that its ``checkpoint.json`` lists."""
    try:
        files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
        sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
        return all(sizes.get(name) == files[name]["bytes"] for name in names or files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def weights_file(ref: str | AnyPath) -> AnyPath:
    """Return the weights file of a run or of a checkpoint; a file is returned as it is.

    Raises:
        UserError: The folder has no checkpoint, or its weights are damaged.
    """
    path = to_path(ref)
    if not path.is_dir():
        return path
    folder = find_checkpoint(path)
    try:
        with verified_file(folder, read_summary(folder), BACKBONE):
            return folder / BACKBONE
    except DamagedCheckpoint as error:
        raise UserError(f"{error}: name an older checkpoint of the run, or --resume it") from None


# Writing


def write_tensors(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, int | str]:
    """Write a safetensors file; return its size and checksum for ``checkpoint.json``."""
    with atomic_file(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        return _size_and_checksum(part)


def copy_file(source: AnyPath, path: AnyPath) -> dict[str, int | str]:
    """Copy a file; return its size and checksum like :func:`write_tensors`."""
    with local_copy(source) as local, atomic_file(path) as part:
        shutil.copyfile(local, part)
        return _size_and_checksum(part)


def write_signed(folder: AnyPath, summary: Summary) -> None:
    """Write ``checkpoint.json`` with its own checksum. On a local disk the file survives a power failure."""
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
    """Return the checksum of the content of ``checkpoint.json``."""
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def _size_and_checksum(part: Path) -> dict[str, int | str]:
    """Return a file's entry in ``checkpoint.json``."""
    return {"bytes": part.stat().st_size, "sha256": sha256(part)}


# Reading


def read_summary(checkpoint: AnyPath) -> Summary:
    """Return the content of ``checkpoint.json``.

    Raises:
        DamagedCheckpoint: The file is missing, unreadable or changed.
    """
    path = checkpoint / "checkpoint.json"
    try:
        summary = json.loads(path.read_text())
        signature = summary.pop("sha256", None)  # older checkpoints have none
        summary["format"], summary["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path}: not readable") from None
    if signature not in (None, digest(summary)):
        raise DamagedCheckpoint(f"{path}: wrong checksum")
    return summary


@contextmanager
def verified_file(checkpoint: AnyPath, summary: Summary, name: str) -> Iterator[Path]:
    """Bring a file of a checkpoint to the local disk and verify its checksum.

    Raises:
        DamagedCheckpoint: The file, which the message names, is missing or has another checksum.
    """
    try:
        with local_copy(checkpoint / name) as file:
            if sha256(file) != summary["files"].get(name, {}).get("sha256"):
                raise DamagedCheckpoint(f"{checkpoint / name}: wrong checksum")
            yield file
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{checkpoint / name}: missing") from None


def read_tensors(folder: AnyPath, summary: Summary, name: str) -> dict[str, Tensor]:
    """Return all tensors of a file of a checkpoint."""
    with verified_file(folder, summary, name) as file:
        return load_file(file)


def read_head(
    folder: AnyPath, summary: Summary, lo: int, hi: int, common: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a head's tensors for a rank with the rows [lo, hi), whatever ranks wrote them.

    Args:
        folder: Folder of the checkpoint.
        summary: Content of its ``checkpoint.json``.
        lo, hi: First row of the rank, and the first row after its last.
        common: Names of the tensors that are the same on all ranks. The first file holds them; all other tensors
            are split by rows.

    Returns:
        The tensors split by rows, and the common tensors.
    """
    pieces: dict[str, list[Tensor]] = {}
    for part in summary["head"]:
        first, last = part["rows"]
        if not (first < hi and lo < last):
            continue
        with verified_file(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
            for name in set(file.keys()) - set(common):
                rows = file.get_slice(name)[max(lo - first, 0) : min(hi, last) - first]
                pieces.setdefault(name, []).append(rows)
    same: dict[str, Tensor] = {}
    if common:
        with verified_file(folder, summary, summary["head"][0]["file"]) as local, safe_open(local, "pt") as file:
            same = {name: file.get_tensor(name) for name in common}
    return {name: torch.cat(rows) for name, rows in pieces.items()}, same


def known_rows(folder: AnyPath, rows_S: Tensor) -> Tensor:
    """Read rows of a checkpoint's class matrix: float32 [S, D]. The row −1 is one of zeros.

    Args:
        folder: Folder of the checkpoint.
        rows_S: int64, rows of the checkpoint's class matrix.
    """
    summary = read_summary(folder)
    found: Tensor | None = None
    for part in summary["head"]:
        first, last = part["rows"]
        here_S = (rows_S >= first) & (rows_S < last)
        if found is not None and not here_S.any():
            continue
        with verified_file(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
            held = file.get_tensor("weight")
            found = torch.zeros(len(rows_S), held.shape[1]) if found is None else found
            found[here_S] = held[rows_S[here_S] - first]
    assert found is not None  # a class matrix has one part at least
    return found


def read_identities(folder: AnyPath) -> tuple[list[str], int, int]:
    """Read the names of the identities of a checkpoint's class matrix, the variants of each, and the rows of a class.

    Raises:
        UserError: The checkpoint has no class matrix.
    """
    summary = read_summary(folder)
    if IDENTITIES not in summary["files"]:
        raise UserError(
            f"{folder} has no {IDENTITIES}: give a checkpoint with a class matrix, from a version that stores names"
        )
    with verified_file(folder, summary, IDENTITIES) as local:
        names = pq.read_table(local, columns=["name"])["name"].to_pylist()
    config = summary["config"]
    return names, config["data"].get("variants", 1), config["method"].get("subcentres", 1)
