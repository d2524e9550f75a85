import itertools
import threading

import cv2
import numpy as np
import pytest

from fr_core.config import load_config
from fr_core.data import masks
from fr_core.data.decode import decode
from fr_core.data.schema import open_dataset
from fr_core.data.stream import ahead, batches, blocks_by_ray, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from pipelines.on_ray import start_ray
from tests.conftest import write_dataset


def config_of(dataset, *overrides):
    return load_config("debug_bigface", [f"data.path={dataset}", *overrides])


def test_batches_of_ranks_make_up_the_batch_of_one(dataset):
    config = config_of(dataset, "data.augment.erase=0.5", "data.augment.rotate=10")
    plan = make_plan(config, open_dataset(dataset))
    alone = list(batches(config, plan, Ranks(), 44, 49, blocks_in_process))
    shared = [list(batches(config, plan, Ranks(rank, 2), 44, 49, blocks_in_process)) for rank in range(2)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert np.array_equal(whole.sample_ids, np.concatenate([part.sample_ids for part in parts]))
        assert np.array_equal(whole.images_BHWC, np.concatenate([part.images_BHWC for part in parts]))
        assert np.array_equal(whole.labels_B, np.concatenate([part.labels_B for part in parts]))
    assert [batch.epoch for batch in alone] == [0, 0, 1, 1, 1]


def test_a_label_outside_the_manifest_is_named(tmp_path):
    root = write_dataset(tmp_path / "shards", 300, 10)
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"identities": 10', '"identities": 9'))
    config = config_of(root)
    plan = make_plan(config, open_dataset(root))
    with pytest.raises(UserError, match=r"sample .* has label 9, outside the manifest's 9 identities"):
        list(batches(config, plan, Ranks(), 0, plan.steps_per_epoch, blocks_in_process))


def test_grouped_shards_are_refused_with_the_mend(dataset):
    opened = open_dataset(dataset)
    grouped = type(opened)(opened.root, opened.manifest.model_copy(update={"layout": "grouped"}))
    with pytest.raises(UserError, match="--layout flat"):
        make_plan(config_of(dataset), grouped)


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_masks_are_put_on_where_the_landmarks_say(layout, tmp_path, monkeypatch):
    """Every masked image, and no other, is changed; its own points are used, by ranks as by one process."""
    root = write_dataset(tmp_path / "shards", 300, 20, layout=layout, points=True)
    recipe = "debug_bigface" if layout == "flat" else "debug_attfc"
    given = [f"data.path={root}", "data.augment.flip=0", "net.input_size=32", "train.global_batch=32"]
    dataset, points, asked = open_dataset(root), {}, []
    for shard, group, _ in dataset.row_groups.tolist():
        points |= {decode(jpeg).tobytes(): own for _, _, jpeg, own in dataset.read_images(shard, group)}

    def mark(image, own, *more):
        known = points[image.tobytes()]
        asked.append(np.isnan(own).all() if known is None else np.array_equal(own, known))
        return 255 - image

    monkeypatch.setattr(masks, "masked", mark)

    def taken(ratio, ranks):
        config = load_config(recipe, [*given, f"data.masks.ratio={ratio}"])
        return list(batches(config, make_plan(config, dataset), ranks, 0, 4, blocks_in_process))

    for plain, worn in zip(taken(0, Ranks()), taken(0.35, Ranks()), strict=True):
        for name in ("images_BHWC", "class_images_BKHWC"):
            a, b = getattr(plain, name).flatten(0, -4), getattr(worn, name).flatten(0, -4)
            changed = (a != b).flatten(1).any(1)
            assert (b[changed] == 255 - a[changed]).all()
    assert all(asked)
    total = 4 * 32 * (1 if layout == "flat" else 3)
    assert 0.2 < len(asked) / total < 0.5
    alone, shared = taken(0.35, Ranks()), [taken(0.35, Ranks(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert np.array_equal(whole.images_BHWC, np.concatenate([part.images_BHWC for part in parts]))


def test_ahead_keeps_order_raises_and_stops():
    def failing():
        yield 1
        raise ValueError("broken")

    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    items = ahead(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    before = threading.active_count()
    endless = ahead(itertools.count(), 2)
    assert [next(endless), next(endless)] == [0, 1]
    endless.close()
    assert threading.active_count() == before


@pytest.mark.ray
def test_ray_reads_the_same_rows_as_this_process(dataset):
    start_ray()
    config = config_of(dataset, "data.shuffle_window=300")
    plan = make_plan(config, open_dataset(dataset))
    for ranks in (Ranks(), Ranks(1, 2)):
        here = list(blocks_in_process(plan, ranks, 5, 60))
        there = list(blocks_by_ray(plan, ranks, 5, 60))
        assert len(here) == len(there) > 4
        for one, other in zip(here, there, strict=True):
            assert one.equals(other.cast(one.schema))


@pytest.mark.parametrize("layout", ["flat", "grouped"])
def test_progressive_resizing_shrinks_the_first_epochs_only(dataset, grouped, layout):
    flat = layout == "flat"
    recipe, data = ("debug_bigface", dataset) if flat else ("debug_attfc", grouped)
    given = [f"data.path={data}", "net.input_size=32", "net.stem_stride=2", "train.epochs=5", "data.augment.erase=1"]
    small = load_config(recipe, [*given, "data.progressive={size=20,share=0.6}"])
    plain = load_config(recipe, given)
    plan = make_plan(small, open_dataset(data))
    for epoch, side in ((0, 20), (2, 20), (3, 32), (4, 32)):
        step = epoch * plan.steps_per_epoch
        (batch,) = batches(small, plan, Ranks(), step, step + 1, blocks_in_process)
        (whole,) = batches(plain, plan, Ranks(), step, step + 1, blocks_in_process)
        assert batch.images_BHWC.shape[1:] == (side, side, 3)
        assert batch.class_images_BKHWC.shape[2:] == (side, side, 3)
        assert np.array_equal(batch.sample_ids, whole.sample_ids)
        expected = whole.images_BHWC.numpy().astype(float)
        shrunk = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in expected]
        assert np.abs(np.stack(shrunk) - batch.images_BHWC.numpy()).max() <= 1
