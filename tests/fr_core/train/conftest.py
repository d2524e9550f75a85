"""The short runs of this folder leave their pictures undrawn. Tests of commands draw them."""

import pytest
from matplotlib.figure import Figure

from tests.helpers.ranks import undrawn


@pytest.fixture(autouse=True)
def undrawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", undrawn)
