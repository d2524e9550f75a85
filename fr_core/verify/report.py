"""Figures of a command as JSON, and the pictures that go with them."""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fr_core.data.store import AnyPath, write_text_atomically
from fr_core.verify.pairs import Verification, tars

CURVE_POINTS = 400
SMALLER_IS_BETTER = re.compile(r"(^|[/_])(mfr|fnmr_at_fmr_1e-\d+|loss|seconds|mib)$")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def smaller_is_better(figure: str) -> bool:
    """Whether a run is the better for less of a figure: an error, a loss, time, memory."""
    return bool(SMALLER_IS_BETTER.search(figure))


def make_report(command: str, figures: Mapping[str, float], **more: object) -> dict[str, object]:
    """The JSON object that every command writes: command, version, machine, figures, and what else it has to say."""
    own: dict[str, object] = {
        "command": command,
        "version": version("bigface"),
        "machine": machine(),
        "figures": dict(figures),
    }
    return own | more


def write_report(path: AnyPath, content: Mapping[str, object]) -> None:
    """Writes a report, whole or not at all; NaN is refused.

    Raises:
        OSError: the path cannot be written.
        ValueError: a figure is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def verification_figures(result: Verification, prefix: str = "") -> dict[str, float]:
    """Flat figures of a verification: accuracy, accuracy_std, threshold, pairs, tar_at_far_1e-2 …; _low and _high."""
    figures = {
        "accuracy": result.accuracy,
        "accuracy_std": result.accuracy_std,
        "threshold": result.threshold,
        "pairs": result.pairs,
    }
    figures["accuracy_low"], figures["accuracy_high"] = result.accuracy_interval
    for far, tar in result.tar_at_far.items():
        name = f"tar_at_far_{far_name(far)}"
        figures[name] = tar
        figures[f"{name}_low"], figures[f"{name}_high"] = result.tar_intervals[far]
    return {prefix + name: float(value) for name, value in figures.items()}


def far_name(far: float) -> str:
    """1e-2 for 0.01."""
    return f"1e-{round(-np.log10(far))}"


def markdown(table: list[tuple[str, ...]]) -> str:
    """A table, header first, as README shows it."""
    lines = [table[0], tuple("---" for _ in table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def roc_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """ROC of one or more nets, the false accept rate on a log axis.

    Args:
        curves: name -> scores [P], same [P].
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    smallest = 1.0
    for name, (scores, same) in curves.items():
        far, tar = _curve(scores, same)
        smallest = min(smallest, far[0])
        axes.step(far, tar, where="post", label=name)
    axes.set(xscale="log", xlim=(smallest, 1), ylim=(0, 1), xlabel="false accept rate", ylabel="true accept rate")
    axes.set_title("ROC")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def det_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """DET: false non-match rate over false match rate, both on log axes.

    Args:
        curves: as for :func:`roc_figure`.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    least_match = least_miss = 1.0
    for name, (scores, same) in curves.items():
        far, tar = _curve(scores, same)
        miss = 1 / max(1, int(same.sum()))
        axes.step(far, np.maximum(1 - tar, miss), where="post", label=name)
        least_match, least_miss = min(least_match, far[0]), min(least_miss, miss)
    axes.set(xscale="log", yscale="log", xlim=(least_match, 1), ylim=(least_miss, 1))
    axes.set(xlabel="false match rate", ylabel="false non-match rate", title="DET")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower left")
    return figure


def score_figure(scores: np.ndarray, same: np.ndarray, threshold: float) -> Figure:
    """Histogram of the cosines of same and different pairs."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(min(-0.2, float(scores.min())), 1, 80).tolist()
    for value, name in ((False, "different"), (True, "same")):
        axes.hist(scores[same == value], bins=bins, alpha=0.6, density=True, label=name)
    axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine", ylabel="density", title="Scores of the pairs")
    axes.legend()
    return figure


def contact_sheet(images_NHWC: np.ndarray, columns: int, title: str) -> Figure:
    """uint8 images [N, H, W, 3] in rows of ``columns``."""
    rows = -(-len(images_NHWC) // columns)
    size = images_NHWC.shape[1]
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, image in enumerate(images_NHWC):
        y, x = divmod(i, columns)
        sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = image
    figure = Figure(figsize=(columns, rows + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet)
    axes.set_title(title)
    axes.axis("off")
    return figure


def _curve(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR, evenly on a log axis from the smallest that the impostors resolve, and TAR there."""
    far = np.geomspace(1 / max(1, int((~same).sum())), 1, CURVE_POINTS)
    return far, tars(scores, same, far)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
