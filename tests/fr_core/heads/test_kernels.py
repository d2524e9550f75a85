"""The Triton kernels: run by Triton's interpreter or a card, and compiled for cards that are not here.

Each has a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported. Without Triton they skip.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).parents[3]
PRODUCTS = {"_log_sum_exp", "_exponentials", "_add_product"}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")


def run(*words, **environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=own | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_in_the_interpreter_they_equal_float64():
    if Version(version("triton")) < Version("3.9"):
        pytest.skip("older interpreters fail with NumPy 2.4")
    report = run("pytest", "-q", "tests/fr_core/heads/kernels_alone.py", TRITON_INTERPRET="1")
    assert " passed" in report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_on_a_card_they_equal_float64():
    report = run("pytest", "-q", "tests/fr_core/heads/kernels_alone.py")
    assert " passed" in report


@pytest.mark.parametrize(
    ("card", "precision"),
    [
        (90, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in [(80, "bfloat16"), (86, "float16"), (89, "bfloat16"), (100, "bfloat16"), (90, "float32")]
        ),
    ],
)
def test_they_compile_for_cards_and_a_tile_costs_little(card, precision):
    """Products of halves run on tensor cores, those of float32 do not; no number leaves the registers for a stack."""
    found = json.loads(run("tests.helpers.compiled_kernels", str(card), precision))
    assert {kernel["name"] for kernel in found["compiled"]} > PRODUCTS
    for kernel in found["compiled"]:
        assert kernel["tensor_cores"] == (kernel["name"] in PRODUCTS and precision != "float32"), kernel
        assert kernel["stack"] == 0, kernel
    for tile in found["tiles"].values():
        assert tile["launches"] <= 8
        assert tile["bytes"] <= 30
