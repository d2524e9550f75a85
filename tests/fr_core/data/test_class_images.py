from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fr_core.config.recipes import load_config
from fr_core.data import class_images, schema, stream
from fr_core.data.class_images import Pool, row_groups
from fr_core.data.plan import Block, read_block
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_by_ray, blocks_in_process, make_plan
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from pipelines.ray_start import start_ray
from tests.helpers.datasets import write_dataset

BLOCK = Block(epoch=0, number=0, rank=0, size=1)
APART = ["data.spread=4", "data.shuffle_window=32"]  # a strand is 36 rows behind the one before, and 600 are enough


def config_of(root, *overrides):
    return load_config("debug_attfc", [f"data.path={root}", "data.lanes=8", "data.shuffle_window=256", *overrides])


def batches_of(config, ranks, start, stop, blocks=blocks_in_process):
    return list(batches(config, make_plan(config, open_dataset(config.data.path)), ranks, start, stop, blocks))


@pytest.fixture(scope="module")
def pool(grouped):
    config = config_of(grouped)
    plan = make_plan(config, open_dataset(grouped))
    with ThreadPoolExecutor(2) as threads:
        held = row_groups(read_block(plan, BLOCK), 10**6, threads)
    return Pool.of(held, plan.block_rows(BLOCK)), plan


def test_the_pool_is_the_samples_of_the_plan_and_their_chunks(pool, grouped):
    pool, plan = pool
    rows = plan.block_rows(BLOCK)
    dataset = open_dataset(grouped)
    for position, (group, within) in zip(pool.order_Q, rows, strict=True):
        table = dataset.read_row_group(*plan.dataset.row_groups[group, :2].tolist())
        assert pool.sample_ids_P[position] == np.concatenate(table["sample_ids"].to_pylist())[within]
    for start, size in set(zip(pool.chunk_start_P.tolist(), pool.chunk_size_P.tolist(), strict=True)):
        assert len(set(pool.labels_P[start : start + size])) == 1
    assert len(pool.images) == len(pool.labels_P)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_class_images_are_others_of_the_identity_each_once_while_they_last(pool, count):
    pool, _ = pool
    drawn = pool.class_images(pool.order_Q, count, 0, 3)
    for sample, chosen in zip(pool.order_Q, drawn, strict=True):
        others = pool.chunk_size_P[sample] - 1
        assert (pool.labels_P[chosen] == pool.labels_P[sample]).all()
        assert (sample in chosen) == (others == 0)
        assert len(set(chosen.tolist())) == max(1, min(count, others))
    assert pool.chunk_size_P[pool.order_Q].min() == 1  # the lonely ones were there


def test_draws_differ_between_epochs_and_reach_every_other_image(pool):
    pool, _ = pool
    sample = pool.order_Q[pool.chunk_size_P[pool.order_Q] == 6][:1]
    seen = {int(pool.class_images(sample, 1, 0, epoch)[0, 0]) for epoch in range(60)}
    assert len(seen) == 5


@pytest.mark.parametrize("order", [[], APART], ids=["held whole", "in strands"])
def test_batches_do_not_depend_on_the_ranks_or_on_where_a_run_was_resumed(grouped, order):
    config = config_of(grouped, "data.augment.rotate=10", *order)
    alone = batches_of(config, Ranks(), 0, 30)
    shared = [batches_of(config, Ranks(rank, 2), 13, 30) for rank in range(2)]
    for whole, *parts in zip(alone[13:], *shared, strict=True):
        assert np.array_equal(whole.sample_ids, np.concatenate([part.sample_ids for part in parts]))
        assert torch.equal(whole.labels_B, torch.cat([part.labels_B for part in parts]))
        assert torch.equal(whole.images_BHWC, torch.cat([part.images_BHWC for part in parts]))
        assert torch.equal(whole.class_images_BKHWC, torch.cat([part.class_images_BKHWC for part in parts]))
    epoch = np.concatenate([batch.sample_ids for batch in alone[:18]])
    assert len(np.unique(epoch)) == len(epoch) == 18 * 32


def test_a_sample_alone_is_its_own_class_image_under_another_flip(tmp_path):
    """One identity has 40 images, so that the method is content; the others have one each."""
    root = write_dataset(tmp_path / "shards", 60, 60, layout="grouped")
    dataset = open_dataset(root)
    assert dataset.identity_counts().max() == 1
    with pytest.raises(
        UserError, match=r"takes 2 other images of a person, but no identity of .* has more than 1: lower"
    ):
        make_plan(config_of(root, "train.global_batch=8"), dataset)
    config = config_of(root, "train.global_batch=8", "data.augment.flip=0.5")
    plan = make_plan(config.model_copy(update={"method": load_config("debug_bigface").method}), relaid(dataset))
    plan = type(plan)(dataset, plan.seed, plan.global_batch, plan.lanes, plan.shuffle_window)
    same = flipped = 0
    for batch in batches(config, plan, Ranks(), 0, 7, blocks_in_process):
        for image, others in zip(batch.images_BHWC, batch.class_images_BKHWC, strict=True):
            for other in others:
                same += torch.equal(other, image)
                flipped += torch.equal(other, image.flip(1))
    assert same + flipped == 7 * 8 * 2
    assert min(same, flipped) > 30


def relaid(dataset):
    return type(dataset)(dataset.root, dataset.manifest.model_copy(update={"layout": "flat"}))


@pytest.mark.parametrize(("images", "people", "batch"), [(12_000, 2000, 128), (30_000, 1500, 384)])
def test_batches_are_well_mixed(tmp_path, images, people, batch):
    """At least 100 of 128 samples are of different people; those of 20 images each make whole chunks."""
    root = write_dataset(tmp_path / "shards", images, people, size=8, per_shard=3000, layout="grouped")
    config = load_config("debug_attfc", [f"data.path={root}", f"train.global_batch={batch}"])
    found = [len(batch.labels_B.unique()) for batch in batches_of(config, Ranks(), 30, 34)]
    assert min(found) >= batch * 100 // 128


def test_mistakes_name_the_mend(grouped, dataset, tmp_path):
    with pytest.raises(UserError, match="with --layout grouped, then split: bigface ingest PHOTOS"):
        batches_of(config_of(dataset), Ranks(), 0, 1)
    root = write_dataset(tmp_path / "shards", 100, 10, layout="grouped")
    text = (root / "manifest.json").read_text().replace('"identities": 10', '"identities": 11')
    (root / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="lists 100 images of 10 identities, the manifest 100 of 11"):
        batches_of(config_of(root), Ranks(), 0, 1)


def test_as_many_images_are_decoded_once_as_the_memory_may_hold(grouped, monkeypatch):
    """Batches are the same with any number of them."""
    decoded, held = [], []

    def counted(jpegs, threads, decode_all=class_images.decode_all):
        decoded.append(len(jpegs))
        return decode_all(jpegs, threads)

    def watched(groups, rows, of=Pool.of):
        held.append(sum(len(group.images) for group in groups.values() if group.decoded))
        return of(groups, rows)

    monkeypatch.setattr(class_images, "decode_all", counted)
    monkeypatch.setattr(Pool, "of", watched)
    found = {}
    for mebibytes in (0, 1, 100):  # 0, 341 and all images of 32×32
        decoded.clear(), held.clear()
        found[mebibytes] = batches_of(config_of(grouped, f"data.decoded_mib={mebibytes}", *APART), Ranks(), 5, 30)
        assert max(held) <= mebibytes * 2**20 // (3 * 32 * 32)
        assert (sum(decoded) > 0) == (mebibytes > 0)
    assert max(held) > 341
    for whole, *others in zip(*found.values(), strict=True):
        for other in others:
            assert torch.equal(other.images_BHWC, whole.images_BHWC)
            assert torch.equal(other.class_images_BKHWC, whole.class_images_BKHWC)


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 2)])
def test_a_row_group_is_read_when_a_reader_does_not_hold_it(grouped, monkeypatch, ranks):
    """Batches hold whole chunks, or the pool would miss some; and no row group of an epoch is read in each block."""
    read = []
    original = schema.Dataset.read_row_group
    monkeypatch.setattr(
        schema.Dataset, "read_row_group", lambda self, s, g, c=None: read.append((s, g)) or original(self, s, g, c)
    )
    config = config_of(grouped, *APART)
    plan = make_plan(config, open_dataset(grouped))
    batches_of(config, ranks, 4, 18)
    planned = [plan.fresh_groups(Block(0, number, ranks.rank, ranks.size, 0, 4)) for number in range(4, 18)]
    wanted = [tuple(plan.dataset.row_groups[group, :2].tolist()) for group in np.concatenate(planned)]
    assert read == wanted
    needed = [plan.block_groups(Block(0, number, ranks.rank, ranks.size)) for number in range(4, 18)]
    assert len(read) < 0.7 * sum(map(len, needed))


@pytest.mark.ray
@pytest.mark.parametrize("order", [pytest.param([], marks=pytest.mark.soak), APART], ids=["held whole", "in strands"])
def test_ray_reads_the_same_chunks_as_this_process(grouped, order, monkeypatch):
    start_ray()
    monkeypatch.setattr(stream, "GROUP_ROWS", 200)
    plan = make_plan(config_of(grouped, *order), open_dataset(grouped))
    here = list(blocks_in_process(plan, Ranks(1, 2), 5, 40))
    there = list(blocks_by_ray(plan, Ranks(1, 2), 5, 40))
    assert len(here) == len(there) > 2
    for one, other in zip(here, there, strict=True):
        assert one.equals(other.cast(one.schema))
