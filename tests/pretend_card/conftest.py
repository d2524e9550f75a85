"""The pretend card, which has a process of its own: compiled once, asked once for each group of cases."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.pretend_card.build import NotBuilt, build_guard

ROOT = Path(__file__).parents[2]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Return a function that gives ``python -m tests.pretend_card`` its words, and returns what that prints."""
    try:
        guard = build_guard(tmp_path_factory.mktemp("guard"))
    except NotBuilt as reason:
        pytest.skip(f"no pretend card: {reason}")

    @cache
    def answer(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.pretend_card", "--guard", str(guard), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return answer
