import csv

import numpy as np
import pytest

from fr_core.data.schema import SCHEMA_VERSION, Manifest, flat_table, grouped_table, write_manifest, write_shard
from pipelines.datasets.inspect import inspect


def write(root, layout, rows, names):
    """Rows (label, bytes) as one shard; nothing checks the bytes."""
    root.mkdir()
    flat = [(i, label, data, None) for i, (label, data) in enumerate(rows)]
    chunks = [[row for row in flat if row[1] == label] for label in sorted({row[1] for row in flat})]
    table = flat_table(flat) if layout == "flat" else grouped_table(chunks)
    shard = write_shard(root / "shard-00000.parquet", table, layout)
    counts = np.bincount([label for label, _ in rows], minlength=len(names))
    facts = {"source": "test", "rejects": {}, "warnings": {}, "shards": (shard,), "images": len(rows)}
    manifest = Manifest(schema_version=SCHEMA_VERSION, layout=layout, image_size=112, identities=len(names), **facts)
    write_manifest(root, manifest, names, counts)
    return root


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_findings(photos, tmp_path, layout):
    faces = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    rows = [(0, faces[0]), (0, faces[1]), (0, faces[0]), (1, faces[0]), (1, faces[2]), (2, b"\xff\xd8 broken")]
    root = write(tmp_path / layout, layout, rows, ["ann", "ben", "cy", "dee"])
    told = []
    figures = inspect(root, tmp_path / f"{layout}-out", lambda *counts: told.append(counts))
    assert figures == {
        **{"images": 6, "identities": 4, "fewest_images": 1, "median_images": 2.0, "most_images": 3},
        **{"lonely": 1, "empty": 1, "damaged": 1, "duplicates": 2, "in_two_identities": 1},
    }
    assert told[-1] == (6, 6)
    with (tmp_path / f"{layout}-out" / "findings.csv").open() as file:
        findings = {row["sample_id"]: (row["identity"], row["finding"]) for row in csv.DictReader(file)}
    assert findings == {
        "5": ("cy", "corrupt or truncated"),
        "2": ("ann", "same bytes as 0 of ann"),
        "3": ("ben", "same bytes as 0 of ann"),
    }
    pictures = {path.name for path in (tmp_path / f"{layout}-out").glob("*.png")}
    assert pictures == {"identities.png", "faces.png"}
