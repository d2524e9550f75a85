"""``bigface bench schedule``: FastFace's time per step (docs/methods/fastface.md)."""

import time

import numpy as np

from fr_core.config.optim import FastFace, FastFaceHaar, FastFaceRecurrence
from fr_core.optim.fastface import FastFaceWatcher, HaarWindow, Recurrence, RunWindow


def bench_schedule(steps: int) -> dict[str, float]:
    """Measure FastFace's time per step in microseconds: all forms, in short and long runs, and a naive window.

    Returns:
        ``us_run`` (windows of 4,000), ``us_recurrence`` and ``us_haar`` (m = 4,000), and ``_tenth`` of each for a tenth
        of the steps and of the windows.
        ``us_naive``: NumPy recomputes the mean and the halves of the last m losses at each step.
    """
    losses = (5 + np.random.default_rng(0).normal(0, 0.5, steps)).tolist()
    m = 4000
    long: dict[str, FastFaceWatcher] = {
        "us_run": RunWindow(FastFace(), 20 * m),
        "us_recurrence": Recurrence(FastFaceRecurrence(), 10 * steps, 128),
        "us_haar": HaarWindow(FastFaceHaar(m=m), steps),
    }
    short: dict[str, FastFaceWatcher] = {
        "us_run_tenth": RunWindow(FastFace(), 2 * m),
        "us_recurrence_tenth": Recurrence(FastFaceRecurrence(), steps, 128),
        "us_haar_tenth": HaarWindow(FastFaceHaar(m=m // 10), steps),
    }
    figures: dict[str, float] = {"steps": steps}
    for name, watching in (long | short).items():
        started = time.perf_counter()
        for loss in losses:
            watching.observe(loss)
        figures[name] = (time.perf_counter() - started) / steps * 1e6
    window, means = np.zeros(m), np.zeros(m)
    started, some = time.perf_counter(), steps // 20
    for loss in losses[:some]:
        window = np.append(window[1:], loss)
        means = np.append(means[1:], window.mean())
        float((means[: m // 2].sum() - means[m // 2 :].sum()) / m)
    figures["us_naive"] = (time.perf_counter() - started) / some * 1e6
    return figures
