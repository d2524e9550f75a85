import csv
import json

import pytest
import torch

import fr_core.device
from fr_core.data.synthetic import write_faces
from fr_core.errors import UserError
from pipelines.compare import summary
from pipelines.demo import write_pairs
from tests.pipelines.test_cli import bigface


@pytest.fixture(scope="module")
def given(dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    write_faces(root, 20, 2, workers=1)
    write_pairs(root, 10)
    pairs = [f"verify.images={root / 'images'}", f"verify.pairs={root / 'pairs.csv'}"]
    return [
        "debug_bigface",
        f"data.path={dataset}",
        "train.global_batch=128",
        "train.max_steps=99",
        "tracking.uri=off",
        *pairs,
    ]


def compared(given, folder, *options):
    recipe, *overrides = given
    fixed = ["--epochs", 2, "--fast-epochs", 1, "--results", folder / "r.csv", "--in-process", "--set", "patience=0.2"]
    return bigface("compare", "schedules", recipe, *fixed, *options, *overrides)


def test_a_comparison_goes_on_where_it_was_stopped(given, tmp_path, monkeypatch):
    monkeypatch.setattr(fr_core.device, "use_processor", lambda threads: torch.set_num_threads(1))  # busy cores
    output = compared(given, tmp_path, "--seeds", 1, "--minutes", 0)
    assert "0 minutes are over" in output or len(list(csv.DictReader((tmp_path / "r.csv").open()))) == 1
    compared(given, tmp_path, "--seeds", 1, "--json", tmp_path / "r.json")
    first = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["setting"], row["epochs"]) for row in first] == [("full", "2"), ("cosine", "1"), ("fastface", "1")]
    assert json.loads((tmp_path / "r.json").read_text())["figures"] == {"runs": 3, "wanted": 3}
    compared(given, tmp_path, "--seeds", 1)
    assert list(csv.DictReader((tmp_path / "r.csv").open())) == first
    with pytest.raises(UserError, match="full, seed 0 was run as"):
        compared([*given, "optim.lr=0.01"], tmp_path, "--seeds", 1)


def test_summary_by_hand():
    rows = [{"setting": "a", "accuracy": str(value), "tar_at_far_1e-3": "0.5", "seconds": "10"} for value in (0.8, 0.9)]
    assert summary(rows) == [("a", "2", "85.00 ± 7.07", "0.500 ± 0.000", "10 ± 0")]


def test_mistakes(given, tmp_path):
    with pytest.raises(UserError, match="nothing to compare by"):
        compared(given[:4], tmp_path)
    (tmp_path / "r.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="not a results file"):
        compared(given, tmp_path)
