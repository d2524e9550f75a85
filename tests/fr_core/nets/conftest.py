import pytest


@pytest.fixture(autouse=True)
def small_nets(one_thread):
    """Run on one thread: all nets here are small."""
