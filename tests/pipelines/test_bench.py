import multiprocessing as mp
from types import SimpleNamespace

import numpy as np
import pytest

from fr_core.config.recipes import load_config
from fr_core.data.decode import decode
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from pipelines.bench import plan, turns
from pipelines.bench.data import bench_grouped, bench_masks
from pipelines.bench.heads import bench_attfc, bench_head, bench_margin
from pipelines.bench.manifest import stages, write_simulated
from pipelines.bench.stream import bench_data, table, write_folder


@pytest.fixture
def forked(monkeypatch):
    """Measured processes come of one that has imported all, within a moment; test_bench_memory spawns them."""
    monkeypatch.setattr(turns, "mp", SimpleNamespace(get_context=lambda _: mp.get_context("forkserver")))


@pytest.mark.soak
@pytest.mark.usefixtures("forked")
def test_bench_head_on_a_small_problem():
    """The formulations agree (else it raises) and every figure is there; speed is not judged here."""
    figures = bench_head(2000, 16, 32, 1, 1, False, True, lambda line: None)
    assert {
        "time_ratio_float32",
        "time_ratio_bf16",
        "time_over_products_float32",
        "time_over_products_bf16",
        "peak_over_state",
        "reference_peak_over_state",
        "mib_above_state_n2000",
    } <= figures.keys()
    assert all(value > 0 for name, value in figures.items() if name.startswith(("seconds", "time")))


@pytest.mark.soak
@pytest.mark.usefixtures("forked")
def test_bench_margin_on_a_small_problem():
    figures = bench_margin("curricular", 2000, 16, 32, 1, 1, lambda line: None)
    assert all(figures[name] > 0 for name in ("time_ratio", "peak_ratio", "seconds_arcface", "seconds_curricular"))


def test_bench_margin_refuses_what_is_no_margin():
    with pytest.raises(UserError, match="no such margin; use fixed, adaface"):
        bench_margin("arcface", 2000, 16, 32, 1, 1, lambda line: None)


@pytest.mark.usefixtures("forked")
def test_bench_attfc_on_a_small_problem():
    figures = bench_attfc(100_000, 16, 64, 5000, 1, 1, True, lambda line: None)
    wanted = ("head_time_ratio_float32", "head_time_ratio_bf16", "head_memory_ratio", "seconds_n5000", "seconds_n50000")
    assert all(figures[name] > 0 for name in wanted)


def test_bench_grouped_on_small_shards(dataset, grouped):
    figures = bench_grouped(str(dataset), str(grouped), 2)
    assert figures["grouped_over_flat"] > 0


def test_bench_masks_on_few_images():
    figures = bench_masks(20)
    assert all(figures[f"img_s_{name}"] > 0 for name in ("2d", "3d", "plain"))


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_bench_manifest_writes_a_dataset_without_pixels_and_measures_each_stage(layout, tmp_path):
    manifest = write_simulated(tmp_path, layout, 50_000, 9000, 7)
    assert {file.stat().st_blocks for file in tmp_path.glob("*.parquet") if file.stem != "identities"} == {0}
    assert sum(map(sum, (shard.row_groups for shard in manifest.shards))) == 50_000
    assert {n for shard in manifest.shards for n in shard.row_groups[:-1]} <= set(range(128, 134))
    found = stages(str(tmp_path), layout, 8)
    parts = ("open", "plan", "late_block")
    assert found.keys() == {"start", *parts, "first_block", "next_block", "counts", "names"}
    assert found["start"][0] >= sum(found[part][0] for part in parts) > 0


@pytest.mark.parametrize(("recipe", "layout"), [("debug_bigface", "flat"), ("debug_attfc", "grouped")])
def test_bench_plan_predicts_each_part_that_it_measures(recipe, layout, tmp_path, monkeypatch):
    """How near they come is not judged here."""
    monkeypatch.setattr(plan, "use_processor", lambda threads: None)
    for name, value in (("IDENTITIES", 2000), ("CONVOLUTIONS", ((8, 8, 1),)), ("TIMES", 1)):
        monkeypatch.setattr(plan, name, value)
    write_simulated(tmp_path, layout, 8000, 2000, 1)
    found = plan.as_rank(0, recipe, [f"data.path={tmp_path}", *plan.COMMON], 1, str(tmp_path), 1)
    encoder = {"encoder"} if layout == "grouped" else set()
    assert found.keys() == {"backbone forward", "backbone backward", "head", "update", "step"} | encoder
    for ((measured, predicted),) in found.values():
        assert measured > 0
        assert predicted > 0


def test_the_image_folder_of_bench_data_gives_the_images_of_the_shards(grouped, tmp_path):
    given = [f"data.path={grouped}", "data.augment.flip=0", "net.input_size=32"]
    jpegs, faces = write_folder(open_dataset(grouped), tmp_path / "faces", 200, load_config("debug_attfc", given))
    label_of = {decode(jpeg).tobytes(): label for jpeg, label in zip(jpegs, faces.labels_I.tolist(), strict=True)}
    images_BKHWC, labels_B = faces.__getitems__([3, 199, 50])
    assert images_BKHWC.shape == (3, 1 + 2, 32, 32, 3)
    assert np.array_equal(images_BKHWC[1, 0], decode(jpegs[199]))
    for images_KHWC, label in zip(images_BKHWC, labels_B, strict=True):
        assert {label_of[image.tobytes()] for image in images_KHWC} == {label}


@pytest.mark.soak
def test_bench_data_measures_every_input(dataset, grouped, tmp_path):
    rows, figures = bench_data(str(dataset), str(grouped), tmp_path, 16, 64, 1, lambda line: None)
    assert [row["input"] for row in rows] == ["flip", "small", "masks", "class_images"]
    assert all(figures[f"{row['input']}_{name}"] > 0 for row in rows for name in row if name != "input")
    assert len(table(rows)) == 5


def test_bench_ingest_writes_what_ingest_reads(tmp_path):
    import os

    from fr_core.data.crops import encode
    from fr_core.data.listing import read_image
    from fr_core.data.sources import list_source
    from pipelines.bench.data import _held_by, _write_rec, _write_tar

    jpegs = [encode(np.full((16, 16, 3), grey, np.uint8)) for grey in (0, 99, 200)]
    for name, write in (("faces.tar", _write_tar), ("faces.rec", _write_rec)):
        write(tmp_path / name, jpegs, 120)
        listing = list_source(tmp_path / name)
        rows = listing.images.to_pylist()
        found = [read_image(listing.kind, listing.files[0], row["path"], row["start"], row["length"]) for row in rows]
        assert found == jpegs * 40
        assert np.bincount(listing.labels).tolist() == [50, 50, 20]
    assert _held_by(os.getpid()) > 2**20


@pytest.mark.soak
def test_bench_quant_measures_every_form():
    from fr_core.config.nets import IResNetNet
    from pipelines.bench.quant import bench_quant

    net = IResNetNet(depth=10, width=8, input_size=32, embedding=16)
    (row,), figures, processor = bench_quant(None, None, 8, 8, 1, lambda line: None, [net])
    assert row["net"] == "r10"
    assert all(row[f"{form}_ms"] > 0 for form in ("int8", "float", "plain"))
    assert figures["size_ratio_r10"] == row["int8_mib"] / row["float_mib"]
    assert figures["least_cosine_r10"] > 0.99999
    assert {"speedup_r10", "speedup_over_float_r10"} <= figures.keys()
    assert {"kernels", "vnni", "exact_kernels"} == processor.keys()


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_bench_recovery_trains_what_an_undisturbed_run_does():
    from pipelines.bench.recovery import bench_recovery

    table, figures = bench_recovery(120, 20, lambda line: None)
    assert [row[0] for row in table] == ["killed", "nothing", "worker", "node"]
    for case in ("worker", "node"):
        assert figures[f"seconds_{case}"] > 0
        assert 0 <= figures[f"again_{case}"] <= 20 + 1  # what a step in between adds
        assert abs(figures[f"loss_gap_{case}"]) < 1e-3
        assert abs(figures[f"accuracy_gap_{case}"]) < 0.01
