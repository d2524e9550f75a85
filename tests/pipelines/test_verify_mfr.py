import shutil

import numpy as np
import pytest
import torch

from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.nets.open import Recogniser
from pipelines.nets.verify_mfr import mfr_figures, verify_mfr


def test_masked_images_are_compared_with_standard_ones(photos, tmp_path):
    for path in sorted(photos.rglob("*.jpg")):
        kind = "masked" if path.stem in "01" else "standard"
        new = tmp_path / kind / path.parent.name / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    (tmp_path / "masked" / "person2" / "0.jpg").write_bytes(b"broken")
    torch.manual_seed(0)
    recogniser = Recogniser(IResNet(10, 8, 1, 32, 16).eval(), torch.device("cpu"))
    result = verify_mfr(recogniser, tmp_path)
    assert list(result.failed) == ["masked/person2/0.jpg"]
    assert (result.nonmatches["masked"].genuine, result.nonmatches["masked"].impostors) == (11 * 3, 11 * 15)
    assert (result.nonmatches["standard"].genuine, result.nonmatches["standard"].impostors) == (6 * 3, 15 * 9)
    assert result.score is None  # too few pairs for an FMR of 1e-5
    assert mfr_figures(result)["images"] == 30
    assert np.isin(["masked_genuine", "standard_impostors"], list(mfr_figures(result))).all()


def test_both_folders_must_be_there(tmp_path):
    (tmp_path / "masked" / "ann").mkdir(parents=True)
    (tmp_path / "masked" / "0.jpg").touch()
    recogniser = Recogniser(IResNet(10, 8, 1, 32, 16), torch.device("cpu"))
    with pytest.raises(UserError, match=r"masked: no images in it: expected masked/NAME/\*\.jpg"):
        verify_mfr(recogniser, tmp_path)
