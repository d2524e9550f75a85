"""Embeddings of a dataset on disk: one Parquet file per shard, and ``embeddings.json`` that describes them.

Legend: I images, B batch, D embedding.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from fr_core.data.schema import Dataset
from fr_core.data.store import explain_disk_errors, prefetch
from fr_core.errors import UserError

FACTS = "embeddings.json"
BY_ID = "by_id-{}.npy"  # files that :func:`by_id` writes into the folder
IN_MEMORY = 2**31  # bytes of embeddings that :meth:`Embeddings.by_identity` holds at a time


class Facts(BaseModel):
    """The content of ``embeddings.json``: which net embedded which dataset, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str  # :attr:`Dataset.stamp` of the dataset
    net: str  # checksum of the weights
    flip: bool  # whether the mirrored image's embedding is added
    embedding: int  # D
    images: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Embeddings:
    """An opened folder of embeddings. All have length 1."""

    root: Path
    facts: Facts

    def by_identity(self, in_memory: int = IN_MEMORY) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield whole identities, as many at a time as ``in_memory`` bytes hold. Each turn reads the files once.

        Yields:
            labels int64 [I], rising; sample ids int64 [I], rising within a label; embeddings float32 [I, D].
        """
        files = [str(self.root / file) for file in self.facts.files]
        counts = np.bincount(pq.ParquetDataset(files).read(columns=["label"])["label"].to_numpy())
        turn = np.cumsum(counts) * 4 * self.facts.embedding // in_memory
        begins = np.flatnonzero(np.diff(turn, prepend=-1))
        for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(counts)], strict=True):
            table = pq.ParquetDataset(files, filters=[("label", ">=", first), ("label", "<", last)]).read()
            table = table.sort_by([("label", "ascending"), ("sample_id", "ascending")]).combine_chunks()
            flat = table["embedding"].combine_chunks().flatten().to_numpy()
            labels, ids = (table[name].to_numpy().astype(np.int64) for name in ("label", "sample_id"))
            yield labels, ids, flat.reshape(-1, self.facts.embedding)


@dataclass(frozen=True)
class EmbeddingsById:
    """Embeddings looked up by sample id. The files are memory-mapped, so processes of one node share what they read."""

    ids_I: np.ndarray  # int64, rising
    rows_I: np.ndarray  # int64, row of each id in the embeddings
    embeddings_ID: np.ndarray  # float16

    def __call__(self, ids_B: np.ndarray) -> np.ndarray:
        """Look up embeddings: float32 [B, D]. Every id must be present."""
        return self.embeddings_ID[self.rows_I[np.searchsorted(self.ids_I, ids_B)]].astype(np.float32)


def open_embeddings(root: Path) -> Embeddings:
    """Open a folder that ``bigface embed`` finished.

    Raises:
        UserError: there are no embeddings, or they are incomplete.
    """
    path = root / FACTS
    if not path.is_file():
        command = f"bigface embed NET --data SHARDS --out {quote(str(root))}"
        raise UserError(f"{root}: no embeddings; make them with: {command}")
    try:
        facts = Facts.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: not readable: {str(error).splitlines()[0]}; run bigface embed again") from None
    missing = [file for file in facts.files if not (root / file).is_file()]
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(facts.files)} files are missing; run bigface embed again")
    return Embeddings(root, facts)


def by_id(embeddings: Embeddings, dataset: Dataset) -> EmbeddingsById:
    """Prepare a dataset's embeddings for look-ups by sample id.

    The first call writes two files beside the Parquet files. One holds the embeddings as float16, half their size:
    42 million × 512 take 43 GB. The other is an index of 16 bytes per image. Rounding moves a unit vector by less
    than 5e-4. A look-up reads D·2 bytes per image at random positions. If the storage is slow at this, give the node
    enough memory to cache the file.

    Raises:
        UserError: the embeddings belong to another dataset, images have no embedding, or the folder is not writable.
    """
    root, facts = embeddings.root, embeddings.facts
    if facts.dataset != dataset.stamp:
        command = f"bigface embed NET --data {quote(str(dataset.root))} --out NEW"
        raise UserError(f"{root}: embeddings of another dataset; make them with: {command}")
    key = hashlib.sha256(facts.model_dump_json().encode()).hexdigest()[:8]
    index, vectors = (root / BY_ID.format(f"{key}-{part}") for part in ("index", "float16"))
    if not (index.is_file() and vectors.is_file()):
        with explain_disk_errors(vectors):
            _write_by_id(embeddings, dataset, index, vectors)
    ids_I, rows_I = np.load(index, mmap_mode="r")
    return EmbeddingsById(ids_I, rows_I, np.load(vectors, mmap_mode="r"))


def _write_by_id(embeddings: Embeddings, dataset: Dataset, index: Path, vectors: Path) -> None:
    """Write the index and the float16 embeddings.

    Raises:
        UserError: images of the dataset have no embedding.
    """
    root, facts = embeddings.root, embeddings.facts
    files = [str(root / file) for file in facts.files]
    ids_I = pq.ParquetDataset(files).read(columns=["sample_id"])["sample_id"].to_numpy()
    missing = np.setdiff1d(_sample_ids(dataset), ids_I)
    if len(missing):
        raise UserError(
            f"{root}: {len(missing)} images of {dataset.root} have no embedding there, first sample {missing[0]}; "
            "embed the dataset again with: bigface embed … --overwrite"
        )
    # Other processes may write the same files, so each writes into a private folder first.
    with TemporaryDirectory(dir=root, prefix=".by_id-") as folder:
        scratch, row = Path(folder) / vectors.name, 0
        mapped = np.lib.format.open_memmap(scratch, "w+", np.float16, (len(ids_I), facts.embedding))
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(columns=["embedding"]):
                mapped[row : row + len(batch)] = batch["embedding"].flatten().to_numpy().reshape(-1, facts.embedding)
                row += len(batch)
        mapped.flush()
        scratch.replace(vectors)
        order_I = np.argsort(ids_I)
        np.save(Path(folder) / index.name, np.stack([ids_I[order_I], order_I]))
        (Path(folder) / index.name).replace(index)


def _sample_ids(dataset: Dataset) -> np.ndarray:
    """Read the sample ids of all images of flat shards: int64 [I]."""
    groups = dataset.row_groups[:, :2].tolist()
    reads = (partial(dataset.read_row_group, shard, group, ["sample_id"]) for shard, group in groups)
    tables = [read() for read in (reads if isinstance(dataset.root, Path) else prefetch(reads))]
    return pa.concat_tables(tables)["sample_id"].to_numpy()


def write_embeddings(path: Path, sample_ids_I: np.ndarray, labels_I: np.ndarray, embeddings_ID: np.ndarray) -> None:
    """Write the embeddings of one shard. The file gets its name once it is complete."""
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
