"""Embeddings looked up by sample id."""

import numpy as np
import pytest

from fr_core.data.embeddings import by_id, open_embeddings
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from tests.helpers.datasets import write_dataset
from tests.helpers.embeddings import embedded


def test_look_ups_are_the_embeddings_of_the_samples(dataset, tmp_path):
    opened = open_dataset(dataset)
    vectors = embedded(tmp_path / "e", opened)
    ids = np.array([1499, 0, 7, 7, 731])
    for _ in range(2):  # made, then found
        found = by_id(open_embeddings(tmp_path / "e"), opened)(ids)
        assert (found.shape, found.dtype) == ((5, 6), np.float32)
        assert np.linalg.norm(found - vectors[ids], axis=1).max() < 5e-4
    others = embedded(tmp_path / "e", opened, net="another", seed=1)  # in the same folder: made anew
    assert np.allclose(by_id(open_embeddings(tmp_path / "e"), opened)(ids), others[ids], atol=5e-4)


def test_what_does_not_join_is_named(dataset, tmp_path):
    opened = open_dataset(dataset)
    other = open_dataset(write_dataset(tmp_path / "other", 300, 10))
    embedded(tmp_path / "e", opened)
    with pytest.raises(UserError, match=r"embeddings of another dataset; .* bigface embed NET --data .*other"):
        by_id(open_embeddings(tmp_path / "e"), other)
    embedded(tmp_path / "part", opened, without=(700, 13, 1200))
    with pytest.raises(UserError, match=r"3 images of .* have no embedding there, first sample 13;"):
        by_id(open_embeddings(tmp_path / "part"), opened)
