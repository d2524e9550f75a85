import pytest

import pipelines.bench.memory as bench
from fr_core.config.recipes import load_config
from fr_core.ranks import Ranks

SMALL = ["net.depth=10", "net.width=8", "net.input_size=32", "train.global_batch=16", "train.precision=float32"]


def test_settings_that_change_no_arithmetic_have_one_loss():
    losses = {}
    for setting in bench.settings(16):
        step = bench.stepper(load_config("bigface_r100", [*SMALL, *setting.overrides]), Ranks(), 1000)
        losses[setting.name] = [step() for _ in range(3)][-1]
    same = [name for name in losses if not any(word in name for word in ("ghost", "accumulate", "bfloat16"))]
    assert len(same) >= 6
    assert [losses[name] for name in same] == pytest.approx([losses["plain"]] * len(same), abs=1e-3)
    assert losses["ghost batch"] == pytest.approx(losses["accumulate"], abs=1e-3)


def test_the_table(monkeypatch):
    """Figures by hand: what is measured depends on the switches here."""
    monkeypatch.setattr(
        bench,
        "measured",
        lambda config, size, *_: (100.0 / (1 + config.train.recompute) / size, 2.0 * (1 + config.train.recompute)),
    )
    rows, figures = bench.bench_memory(10, 8, 32, 16, 1000, 1, 2, lambda line: None)
    assert rows[1] == ("plain", "100", "1.00", "2.00", "1.00")
    assert rows[2] == ("recompute", "50", "0.50", "4.00", "2.00")
    assert figures["two_ranks_all_mib"] == 25


@pytest.mark.soak
def test_two_ranks_are_measured_in_processes_of_their_own():
    """More identities, more memory: of rank 0's half of the class matrix and its momentum."""
    config = load_config("bigface_r100", [*SMALL, "method.update=fused"])
    peak, seconds = bench.measured(config, 2, 20_000, 1, 1)
    assert seconds > 0
    assert 35 < peak < 120  # 10,000 rows of 512 numbers, twice, are 39 MiB
