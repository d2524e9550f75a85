import numpy as np
import pytest

from fr_core.config.recipes import load_config
from fr_core.data.crops import TEMPLATE
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.data.virtual import FIELD, displacements, variants
from fr_core.ranks import Ranks


def test_each_sample_shows_each_variant_once_in_as_many_epochs():
    shown = np.stack([variants(5, epoch, np.arange(50), 4) for epoch in range(4)])
    assert (np.sort(shown, 0) == np.arange(4)[:, None]).all()
    assert len(set(shown[0].tolist())) == 4


def test_a_variant_is_one_field_whatever_the_sample_and_the_first_is_the_face_itself():
    labels, variant = np.array([7, 7, 7, 8, 2]), np.array([1, 1, 2, 1, 0])
    fields = displacements(0, labels, variant, 0.02)
    assert np.array_equal(fields[0], fields[1])
    assert not np.allclose(fields[0], fields[2])
    assert not np.allclose(fields[0], fields[3])
    assert not fields[4].any()
    assert np.allclose(displacements(0, labels[2:3], variant[2:3], 0.02), fields[2:3], atol=1e-9)
    assert np.array_equal(
        displacements(0, np.repeat(labels, 100), np.repeat(variant, 100), 0.02), np.repeat(fields, 100, 0)
    )


def test_fields_are_symmetric_of_the_given_strength_and_need_no_new_alignment():
    fields = 112 * displacements(1, np.arange(400), np.ones(400, np.int64), 0.02).astype(float)
    mirrored = fields[:, :, ::-1] * [-1, 1]
    assert np.abs(fields - mirrored).mean() < 0.1 * np.abs(fields).mean()  # the template itself leans a little
    assert 0.5 < fields.std() / (0.02 * 112) < 1.0  # the strength is that of free points; the border does not move
    places = ((TEMPLATE + 0.5) * FIELD / 112).astype(int)
    moved = fields[:, places[:, 1], places[:, 0]]
    assert np.abs(moved.mean(1)).max() < 0.8  # pixels: no common shift of the five points
    centred = TEMPLATE - TEMPLATE.mean(0)
    scale = np.einsum("npa,pa->n", moved, centred) / (centred**2).sum()
    assert np.abs(scale).max() < 0.03


@pytest.mark.parametrize("count", [1, 3])
def test_classes_of_a_run(dataset, count):
    config = load_config("debug_bigface", [f"data.path={dataset}", f"data.variants={count}"])
    plan = make_plan(config, open_dataset(dataset))
    stream = list(batches(config, plan, Ranks(), 0, plan.steps_per_epoch, blocks_in_process))
    labels = np.concatenate([batch.labels_B for batch in stream])
    assert len(np.unique(labels)) == 40 * count
    plain = list(batches(load_config("debug_bigface"), plan, Ranks(), 0, plan.steps_per_epoch, blocks_in_process))
    assert np.array_equal(labels // count, np.concatenate([batch.labels_B for batch in plain]))
