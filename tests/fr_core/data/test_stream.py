import itertools
import threading

import cv2
import numpy as np
import pytest

from fr_core.config.recipes import load_config
from fr_core.data import masks, stream
from fr_core.data.decode import decode
from fr_core.data.schema import open_dataset
from fr_core.data.stream import ahead, batches, blocks_by_ray, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from pipelines.ray_start import start_ray
from tests.helpers.datasets import write_dataset


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
    root = write_dataset(tmp_path / "shards", 300, 40, layout=layout, points=True)
    recipe = "debug_bigface" if layout == "flat" else "debug_attfc"
    given = [f"data.path={root}", "data.augment.flip=0", "net.input_size=32", "train.global_batch=32"]
    dataset, points, asked = open_dataset(root), {}, []
    for shard, group, _ in dataset.row_groups.tolist():
        points |= {decode(jpeg).tobytes(): own for _, _, jpeg, own in dataset.read_images(shard, group)}

    def mark(image, face, **more):
        known = points[image.tobytes()]
        asked.append(np.isnan(face).all() if known is None else np.array_equal(face, known))
        return 255 - image

    monkeypatch.setattr(masks, "locate_all", lambda points, size: list(points))
    monkeypatch.setattr(masks, "put_on", mark)

    def taken(ratio, ranks):
        config = load_config(recipe, [*given, f"data.masks.ratio={ratio}"])
        return list(batches(config, make_plan(config, dataset), ranks, 0, 4, blocks_in_process))

    worn_images = 0  # batches are made ahead, so more are asked for than are taken
    for plain, worn in zip(taken(0, Ranks()), taken(0.35, Ranks()), strict=True):
        for name in ("images_BHWC", "class_images_BKHWC"):
            a, b = getattr(plain, name).flatten(0, -4), getattr(worn, name).flatten(0, -4)
            changed = (a != b).flatten(1).any(1)
            assert (b[changed] == 255 - a[changed]).all()
            worn_images += int(changed.sum())
    assert all(asked)
    total = 4 * 32 * (1 if layout == "flat" else 3)
    assert 0.2 < worn_images / total < 0.5
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


def test_a_batch_is_begun_before_the_one_before_it_is_waited_for():
    events = []

    def begun():
        for i in range(3):
            events.append(f"begin {i}")
            yield lambda i=i: events.append(f"finish {i}")

    assert len(list(stream._finished(begun()))) == 3
    assert events == ["begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "finish 2"]


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


def test_balanced_batches_come_from_the_config(dataset):
    config = config_of(dataset, "train.global_batch=64", "data.balanced={}")
    plan = make_plan(config, open_dataset(dataset))
    assert (plan.lanes, plan.groups, plan.group_images) == (8, 8, 4)
    alone = list(batches(config, plan, Ranks(), 3, 6, blocks_in_process))
    shared = [list(batches(config, plan, Ranks(rank, 4), 3, 6, blocks_in_process)) for rank in range(4)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert np.array_equal(whole.images_BHWC, np.concatenate([part.images_BHWC for part in parts]))
        labels = whole.labels_B.reshape(8, 8)
        assert (labels[:, :4] == labels[:, :1]).all()


def test_two_views_of_an_image_stand_side_by_side(dataset, monkeypatch):
    given = ("train.global_batch=64", "data.augment.flip=0", "data.augment.shift=0.2", "data.variants=2")
    config, plain = config_of(dataset, *given, "data.views=2"), config_of(dataset, *given)
    plan = make_plan(config, open_dataset(dataset))
    assert (plan.global_batch, plan.steps_per_epoch) == (32, 46)
    alone = list(batches(config, plan, Ranks(), 3, 6, blocks_in_process))
    shared = [list(batches(config, plan, Ranks(rank, 2), 3, 6, blocks_in_process)) for rank in range(2)]
    once = batches(plain, plan, Ranks(), 3, 6, blocks_in_process)
    for whole, single, *parts in zip(alone, once, *shared, strict=True):
        assert np.array_equal(whole.images_BHWC, np.concatenate([part.images_BHWC for part in parts]))
        first, second = whole.images_BHWC[::2], whole.images_BHWC[1::2]
        assert np.array_equal(whole.sample_ids, np.repeat(single.sample_ids, 2))
        assert np.array_equal(whole.labels_B, np.repeat(single.labels_B, 2))
        assert np.array_equal(first, single.images_BHWC)  # the first view is what one view would be
        assert (first != second).flatten(1).any(1).all()
    ids = np.concatenate([batch.sample_ids for batch in batches(config, plan, Ranks(), 0, 46, blocks_in_process)])
    assert (np.unique(ids, return_counts=True)[1] == 2).all()
    assert len(ids) == 46 * 64


def test_each_view_has_masks_of_its_own(dataset, monkeypatch):
    monkeypatch.setattr(masks, "put_on", lambda image, **more: 255 - image)
    given = ("train.global_batch=64", "data.augment.flip=0", "data.views=2")
    config = config_of(dataset, *given, "data.masks.ratio=0.5")
    plan = make_plan(config, open_dataset(dataset))
    (worn,) = batches(config, plan, Ranks(), 0, 1, blocks_in_process)
    (bare,) = batches(config_of(dataset, *given), plan, Ranks(), 0, 1, blocks_in_process)
    changed = (worn.images_BHWC != bare.images_BHWC).flatten(1).any(1).reshape(32, 2)
    assert 10 < changed.sum() < 54
    assert 5 < (changed[:, 0] != changed[:, 1]).sum() < 27


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["data.balanced={images=3}"],
            "is not a whole number of groups of 3 images: set share to a multiple of 0.046875",
        ),
        (["data.balanced={}", "data.lanes=16"], "does not divide the 8 groups .* leave data.lanes out, or use 8"),
        (["data.balanced={}", "data.views=2"], "both make positive pairs: data.balanced.share = 0"),
        (["data.balanced={}", "data.variants=2"], "data.variants makes several people of one"),
        (["data.views=2", "train.global_batch=63"], "train.global_batch = 63 must be even"),
        (["data.views=2", "data.lanes=64"], "data.lanes = 64 does not divide .* which takes 32 images"),
        (
            ["data.balanced={}", "method={kind='attfc'}"],
            "data.balanced is for flat shards, and attfc reads grouped ones",
        ),
        (["data.views=2", "method={kind='f2c'}"], "data.views = 2 is for flat shards, and f2c reads grouped ones"),
        (
            ["data.sampling=0", "method={kind='attfc'}"],
            "data.sampling is for flat shards, and attfc reads grouped ones",
        ),
        (["data.sampling=0.5", "data.balanced={}"], "data.sampling repeats images, and data.balanced shows each once"),
        (["data.balanced={images=128,share=1}"], "data.balanced.images=128 must be at most 64"),
    ],
)
def test_batches_that_cannot_be_made(given, message):
    with pytest.raises(UserError, match=message):
        load_config("bigface_small", ["train.global_batch=64", "data.variants=1", *given])
