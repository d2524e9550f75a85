import math
from itertools import combinations_with_replacement

import torch

from fr_core.train.notice import WEIGHTS, Notice, strongest
from fr_core.train.reading import ASKED, Reading, known_reading


def test_the_sum_over_ranks_tells_the_strongest_notice():
    for size in (1, 2, 5):
        for notices in combinations_with_replacement(Notice, size):
            assert strongest(sum(WEIGHTS[notice] for notice in notices)) is max(notices)
    assert strongest(64 * 1024 * WEIGHTS[Notice.SAVE]) is Notice.SAVE


def test_a_reading_tells_numbers_and_whether_all_are_finite():
    for number in (2.5, math.nan, math.inf):
        reading = Reading(3, ("loss", ASKED), torch.tensor([number, WEIGHTS[Notice.SAVE]]))
        assert reading.metrics.keys() == {"loss"}
        assert reading.good == math.isfinite(number)
        assert reading.request is Notice.SAVE


def test_a_reading_of_a_checkpoint_is_the_one_that_was_saved():
    saved = Reading(3, ("loss", ASKED), torch.tensor([0.1, 0.0]))
    again = known_reading(saved.step, saved.read())
    assert (again.step, again.read()) == (saved.step, saved.read())
