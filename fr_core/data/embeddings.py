"""Embeddings of a dataset on disk: a Parquet file for each of its shards, and ``embeddings.json`` that says whose.

Legend: I images, D embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from fr_core.errors import UserError

FACTS = "embeddings.json"
IN_MEMORY = 2**31  # bytes of embeddings that are read at once


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str  # stamp of the dataset
    net: str  # checksum of the weights
    flip: bool  # whether the mirrored image's embedding is added
    embedding: int  # D
    images: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Embeddings:
    """An opened folder of embeddings, all of length 1."""

    root: Path
    facts: Facts

    def by_identity(self, in_memory: int = IN_MEMORY) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Whole identities, as many at a time as ``in_memory`` bytes hold; every turn reads the files once.

        Yields:
            labels int64 [I], rising; sample ids int64 [I], rising within a label; embeddings float32 [I, D].
        """
        files = ds.dataset([str(self.root / file) for file in self.facts.files])
        counts = np.bincount(files.to_table(columns=["label"])["label"].to_numpy())
        turn = np.cumsum(counts) * 4 * self.facts.embedding // in_memory
        begins = np.flatnonzero(np.diff(turn, prepend=-1))
        for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(counts)], strict=True):
            label = ds.field("label")
            table = files.to_table(filter=(label >= first) & (label < last))
            table = table.sort_by([("label", "ascending"), ("sample_id", "ascending")]).combine_chunks()
            flat = table["embedding"].combine_chunks().flatten().to_numpy()
            labels, ids = (table[name].to_numpy().astype(np.int64) for name in ("label", "sample_id"))
            yield labels, ids, flat.reshape(-1, self.facts.embedding)


def open_embeddings(root: Path) -> Embeddings:
    """Opens a folder that ``bigface embed`` finished.

    Raises:
        UserError: none there, or not finished.
    """
    path = root / FACTS
    if not path.is_file():
        raise UserError(f"{root}: no embeddings; make them with: bigface embed NET --data SHARDS --out {root}")
    try:
        facts = Facts.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: not readable: {str(error).splitlines()[0]}") from None
    missing = [file for file in facts.files if not (root / file).is_file()]
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(facts.files)} files are missing; run bigface embed again")
    return Embeddings(root, facts)


def write_embeddings(path: Path, sample_ids_I: np.ndarray, labels_I: np.ndarray, embeddings_ID: np.ndarray) -> None:
    """One file, under another name until it is whole."""
    flat = pa.array(embeddings_ID.ravel(), pa.float32())
    table = pa.table(
        {
            "sample_id": pa.array(sample_ids_I, pa.int64()),
            "label": pa.array(labels_I, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings_ID.shape[1]),
        }
    )
    part = path.with_suffix(".part")
    pq.write_table(table, part, compression="none", use_dictionary=False)
    part.replace(path)
