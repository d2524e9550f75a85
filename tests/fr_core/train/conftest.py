"""The many short runs of this folder leave their pictures undrawn, which is half of their time.

Tests of commands draw them.
"""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def undrawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write_bytes(b""))
