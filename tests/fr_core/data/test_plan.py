import itertools
import math

import numpy as np
import pytest

from fr_core.data import decode, schema
from fr_core.data.plan import Block, Plan, balanced_order, read_rows, read_task, weighted_order
from fr_core.data.schema import open_dataset
from fr_core.data.stream import blocks_in_process
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from tests.helpers.datasets import write_dataset


@pytest.fixture(scope="module")
def plan(dataset):
    return Plan(open_dataset(dataset), seed=3, global_batch=48, lanes=12, shuffle_window=200)


def ids_of_steps(plan, size, start, stop):
    """Sample ids of each step's global batch, ranks in order."""
    each, parts = plan.global_batch // size, []
    for rank in range(size):
        ids = [
            i
            for table in blocks_in_process(plan, Ranks(rank, size), start, stop)
            for i in table["sample_id"].to_pylist()
        ]
        parts.append([ids[step * each : (step + 1) * each] for step in range(stop - start)])
    return [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]


def test_an_epoch_takes_each_sample_at_most_once_and_nearly_all(plan):
    assert plan.steps_per_epoch == 1500 // 12 // 4
    ids = np.array(ids_of_steps(plan, 1, 0, plan.steps_per_epoch)).ravel()
    assert len(np.unique(ids)) == len(ids) == plan.steps_per_epoch * 48


def test_global_batches_are_equal_for_every_number_of_ranks_and_after_a_resume(plan):
    """50 steps over an epoch's end, started at W = 1 and resumed at step 17 by 3 ranks, at 40 by 2."""
    alone = ids_of_steps(plan, 1, 0, 50)
    assert ids_of_steps(plan, 2, 0, 50) == alone
    assert ids_of_steps(plan, 3, 0, 50) == alone
    assert ids_of_steps(plan, 3, 17, 40) + ids_of_steps(plan, 2, 40, 50) == alone[17:]


def test_epochs_and_seeds_differ_and_batches_are_mixed(plan):
    first = ids_of_steps(plan, 1, 0, 2)
    later = ids_of_steps(plan, 1, plan.steps_per_epoch, plan.steps_per_epoch + 2)
    other = Plan(plan.dataset, 4, 48, 12, 200)
    assert len(set(first[0]) & set(later[0])) < 12
    assert len(set(first[0]) & set(ids_of_steps(other, 1, 0, 1)[0])) < 12
    assert np.std(first[0]) > 300  # spread over the 1,500, not one neighbourhood


def test_rows_are_read_in_the_order_of_the_plan(plan):
    rows = plan.block_rows(Block(0, 1, 1, 3))
    table = read_rows(plan.dataset, rows)
    groups = plan.dataset.row_groups
    starts = np.array([500 * shard + 128 * group for shard, group, _ in groups])
    assert table["sample_id"].to_pylist() == (starts[rows[:, 0]] + rows[:, 1]).tolist()


def test_skipping_reads_no_pixels_and_only_the_last_block(plan, monkeypatch):
    def forbidden(*_):
        raise AssertionError("decoded")

    read = []
    original = schema.Dataset.read_row_group
    monkeypatch.setattr(decode, "decode", forbidden)
    monkeypatch.setattr(
        schema.Dataset, "read_row_group", lambda self, s, g, c=None: read.append((s, g)) or original(self, s, g, c)
    )
    steps = plan.steps_per_epoch
    next(blocks_in_process(plan, Ranks(), 5 * steps - 1, 5 * steps))
    needed = {
        tuple(plan.dataset.row_groups[g, :2]) for g in np.unique(plan.block_rows(Block(4, steps // 4, 0, 1))[:, 0])
    }
    assert set(read) <= needed
    assert len(read) == len(set(read))


def test_a_number_of_ranks_that_does_not_divide_the_lanes_names_the_nearest(plan):
    with pytest.raises(UserError, match="5 workers do not divide the run's 12 lanes; use 4 or 6"):
        plan.lanes_of(0, 5)
    with pytest.raises(UserError, match=r"13 workers .* use 12$"):
        plan.lanes_of(0, 13)


def test_lanes_that_would_share_the_batch_are_named(plan, balanced):
    """The most of them that are no more than now: 12 lanes of a batch of 48, and 4 of one with 8 groups of a person."""
    with pytest.raises(UserError, match=r"8 workers .* use 6 or 12, or data\.lanes=8 in a new run$"):
        plan.lanes_of(0, 8)
    with pytest.raises(UserError, match=r"48 workers .* use 12, or data\.lanes=48 in a new run$"):
        plan.lanes_of(0, 48)
    with pytest.raises(UserError, match=r"8 workers .* use 4, or data\.lanes=8 in a new run$"):
        balanced.lanes_of(0, 8)
    with pytest.raises(UserError, match=r"16 workers .* use 4$"):
        balanced.lanes_of(0, 16)


def test_another_dataset_at_the_same_place_is_refused(plan):
    """By the processes that read for a run, each of which opens it."""
    where, block = str(plan.dataset.root), (0, 0, 0, 1, 0)
    assert read_task(where, plan.dataset.stamp, plan.arguments, block).num_rows
    with pytest.raises(UserError, match="another dataset than at the run's start"):
        read_task(where, "0" * 64, plan.arguments, block)


def test_a_batch_larger_than_the_dataset_is_refused(dataset):
    with pytest.raises(UserError, match=r"a step of 2048 images .* 1500 images .* lower train\.global_batch"):
        Plan(open_dataset(dataset), 0, 2048, 64, 16384)


@pytest.fixture(scope="module")
def balanced(dataset):
    """8 groups of 3 and 8 random rows in a step of 32, 4 lanes; windows of 8 steps."""
    return Plan(open_dataset(dataset), 3, 32, 4, 256, groups=8, group_images=3)


def labels_of(plan):
    tables = [
        plan.dataset.read_row_group(shard, group, ["sample_id", "label"])
        for shard, group, _ in plan.dataset.row_groups.tolist()
    ]
    return {i: label for t in tables for i, label in zip(*(t[c].to_pylist() for c in t.column_names), strict=True)}


def test_balanced_batches_take_each_sample_once_in_groups_of_one_identity(balanced):
    label_of = labels_of(balanced)
    ids = np.array(ids_of_steps(balanced, 1, 0, balanced.steps_per_epoch))
    assert len(np.unique(ids)) == ids.size == 1500 // 4 // 8 * 32
    labels = np.vectorize(label_of.get)(ids).reshape(-1, 4, 8)
    first, second = labels[:, :, :3], labels[:, :, 3:6]
    assert (first == first[:, :, :1]).all()  # 1,500 images of 40 identities: groups for every step
    assert (second == second[:, :, :1]).all()
    others = labels[:, :, 6:].reshape(-1, 8)
    assert np.mean([len(set(row)) for row in others.tolist()]) > 6  # random: 7.3 of 8 expected
    assert len(np.unique(labels[0, :, [0, 3]])) > 4  # and so are the groups' identities


def test_balanced_batches_are_equal_for_every_number_of_ranks_and_after_a_resume_in_mid_block(balanced):
    alone = ids_of_steps(balanced, 1, 0, 60)
    assert ids_of_steps(balanced, 2, 0, 60) == alone
    assert ids_of_steps(balanced, 4, 0, 60) == alone
    assert ids_of_steps(balanced, 4, 13, 30) + ids_of_steps(balanced, 2, 30, 60) == alone[13:]
    assert ids_of_steps(balanced, 1, 46, 48)[0] != alone[0]  # the next epoch


def test_of_identities_with_few_images_every_whole_group_is_made_and_no_row_is_lost():
    random = np.random.default_rng(0)
    labels = np.concatenate([np.zeros(9), np.ones(4), np.arange(2, 57).repeat(3)]).astype(np.int64)
    labels = random.permutation(labels)
    order = balanced_order(labels, (5, 2, 16), 2, 4, random)
    assert order.shape == (5, 2, 16)
    assert len(np.unique(order)) == 160
    groups = labels[order[:, :, :8]].reshape(-1, 4)
    whole = (groups == groups[:, :1]).all(1)
    assert whole[:3].all()  # 2 of nine images, 1 of four
    assert sorted(groups[:3, 0]) == [0, 0, 1]
    assert not whole[3:].any()


def test_a_large_window_is_arranged_without_quadratic_work():
    """A million rows in few passes; n² of them would take hours."""
    labels = np.random.default_rng(0).integers(0, 100_000, 1_000_000)
    order = balanced_order(labels, (15_625, 8, 8), 1, 4, np.random.default_rng(1))
    first = labels[order[:, :, :4]]
    assert np.array_equal(np.sort(order.ravel()), np.arange(1_000_000))
    assert (first == first[:, :, :1]).all()


@pytest.fixture(scope="module")
def tailed(tmp_path_factory):
    """6 identities of 200, 60, 20, 10, 6 and 4 images."""
    labels = np.repeat(np.arange(6), TAILED)
    return write_dataset(tmp_path_factory.mktemp("tailed") / "shards", len(labels), 6, labels=labels)


TAILED = [200, 60, 20, 10, 6, 4]


@pytest.mark.parametrize("sampling", [0.0, 0.5])
def test_identities_are_drawn_in_proportion_to_a_power_of_their_images(tailed, sampling):
    """In each window an image comes ⌊e⌋ or ⌈e⌉ times, so of an identity's n images at most n more or fewer than n·e."""
    plan = Plan(open_dataset(tailed), 3, 20, 4, 300, sampling=sampling)
    label_of = labels_of(plan)
    ids = np.array(ids_of_steps(plan, 1, 0, plan.steps_per_epoch))
    assert ids.size == 300
    drawn = np.bincount([label_of[i] for i in ids.ravel()], minlength=6)
    wanted = np.array(TAILED, float) ** sampling
    expected = 300 * wanted / wanted.sum()
    assert (np.abs(drawn - expected) < TAILED).all()
    assert sum(drawn[3:]) > 2 * sum(TAILED[3:])
    times = np.bincount(ids.ravel(), minlength=300)
    for label, each in enumerate(expected / TAILED):
        own = times[[i for i, other in label_of.items() if other == label]]
        assert set(own.tolist()) <= {math.floor(each), math.ceil(each)}


def test_drawn_identities_are_equal_for_every_number_of_ranks_and_after_a_resume_in_mid_block(dataset):
    plan = Plan(open_dataset(dataset), 3, 32, 4, 256, sampling=0.3)
    alone = ids_of_steps(plan, 1, 0, 60)
    assert ids_of_steps(plan, 2, 0, 60) == alone
    assert ids_of_steps(plan, 4, 13, 30) + ids_of_steps(plan, 2, 30, 60) == alone[13:]
    assert ids_of_steps(plan, 1, 46, 48)[0] != alone[0]  # the next epoch
    block = (0, 1, 1, 2, 0)
    there = read_task(str(plan.dataset.root), plan.dataset.stamp, plan.arguments, block)
    assert there["sample_id"].to_pylist() == list(itertools.chain(*alone_of_rank(alone[8:16], 1, 2)))


def alone_of_rank(steps, rank, size):
    each = len(steps[0]) // size
    return [step[rank * each : (rank + 1) * each] for step in steps]


def test_equal_weights_draw_each_row_once_and_weights_their_expected_number():
    random = np.random.default_rng(0)
    assert sorted(weighted_order(np.ones(1000), 1000, random)) == list(range(1000))
    weights = random.random(50) ** 4
    times = sum(np.bincount(weighted_order(weights, 40, random), minlength=50) for _ in range(2000))
    expected = 40 * weights / weights.sum()
    assert np.allclose(times / 2000, expected, atol=5 * 0.5 / 2000**0.5)  # a share's deviation is at most ½
