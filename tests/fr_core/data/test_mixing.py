"""The order of grouped shards mixes people as independent draws do, reads little twice and holds little.

Simulated manifests of MS1MV3 and of an eighth of WebFace21M; ``tests/helpers/mixing.py`` prints the whole figures.
"""

import numpy as np
import pytest

from fr_core.data.plan import Block, Plan, held_rows
from fr_core.data.schema import CHUNK_IMAGES
from tests.helpers.mixing import (
    MS1MV3,
    WF21M,
    WINDOW,
    independent,
    labels_of,
    measured,
    plan_of,
    reading,
    simulated,
    slots_of,
    stream_of,
)

EIGHTH = WF21M._replace(identities=WF21M.identities // 8, images=WF21M.images // 8)
FLOOR = 0.002  # of the share of repeats, where independent draws have almost none


@pytest.fixture(scope="module", params=[MS1MV3, EIGHTH], ids=["MS1MV3", "an eighth of WF21M"])
def people(request):
    return labels_of(request.param)


@pytest.fixture(scope="module")
def spread(people):
    """Plan, label and chunk of each image."""
    dataset, *of_image = simulated(people, CHUNK_IMAGES)
    return plan_of(dataset, slots_of(people)), *of_image


@pytest.mark.parametrize("place", [0, 0.6], ids=["at the epoch's start", "later"])
def test_the_queue_and_the_batches_are_mixed_as_by_independent_draws(people, spread, place):
    plan, labels, _ = spread
    slots = slots_of(people)
    wanted = independent(people, slots)
    found = measured(plan, labels, slots, first=int(place * plan.steps_per_epoch))
    assert found.distinct > 0.9 * wanted.distinct
    assert found.masked < 2 * wanted.masked
    assert found.repeats < 2 * wanted.repeats + FLOOR


def test_chunks_that_are_not_spread_mix_poorly(people):
    """So the figures tell the difference."""
    slots, wanted = slots_of(people), independent(people, slots_of(people))
    dataset, labels, _ = simulated(people, 32)
    found = measured(plan_of(dataset, 0), labels, slots)
    assert found.distinct < 0.2 * wanted.distinct
    assert found.masked > 10 * wanted.masked
    assert found.repeats > 10 * wanted.repeats + FLOOR


def test_little_is_read_twice_and_memory_is_bounded(spread):
    plan, *_ = spread
    bound = held_rows(plan.rows, CHUNK_IMAGES, plan.spread, WINDOW)
    assert bound < plan.rows
    whole, held = reading(plan)
    assert 1 < whole < 1.15
    assert 0.8 * bound < held <= bound
    half = plan.blocks_per_epoch // 2
    resumed, held_then = reading(plan, 4, half)
    assert resumed < 1.3
    assert held_then <= bound


def test_the_images_of_a_chunk_lie_apart_by_the_spread(spread):
    plan, _, chunks = spread
    found = stream_of(plan, chunks, 0, plan.steps_per_epoch)
    order = np.argsort(found, kind="stable")
    apart = np.diff(order)[np.diff(found[order]) == 0]
    assert len(apart) > 0.7 * len(found)
    assert apart.min() > plan.spread - WINDOW
    assert (apart < plan.spread).mean() < 0.1


@pytest.mark.parametrize(
    ("images", "chunk", "lanes", "whole"),
    [(900, 6, 4, True), (901, 5, 2, False), (2000, 2, 4, False), (4000, 4, 8, False), (300, 32, 1, True)],
)
def test_every_image_comes_once_an_epoch(images, chunk, lanes, whole):
    """A small dataset is held whole, and then read once an epoch too."""
    dataset, *_ = simulated(np.arange(images) // 20, chunk)
    plan = Plan(dataset, 3, 8 * lanes, lanes, 64, spread=40)
    rows = np.concatenate([plan.block_rows(Block(1, number, 0, 1)) for number in range(plan.blocks_per_epoch)])
    assert len(np.unique(rows, axis=0)) == len(rows) == plan.steps_per_epoch * plan.global_batch
    read, held = reading(plan)
    assert (read < 1.02) == (held == held_rows(images, chunk, 40, 64) == images) == whole


def test_chunks_of_older_datasets_are_spread_in_parts():
    labels = np.repeat(np.arange(2000), 64)
    dataset, _, chunks = simulated(labels, 32)
    plan = Plan(dataset, 0, 64, 4, 256, spread=1024)
    assert plan.strands == 8
    found = stream_of(plan, chunks, 0, plan.steps_per_epoch)
    near = [np.unique(part, return_counts=True)[1].max() for part in np.split(found[: len(found) // 1024 * 1024], 125)]
    assert np.median(near) <= 8  # 4 of 32 images, or parts of two strands
