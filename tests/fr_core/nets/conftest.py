import pytest


@pytest.fixture(autouse=True)
def small_nets(one_thread):
    """All nets here are small."""
