"""Reports of commands as JSON, and their plots.

The figures of verification and identification, as docs/glossary.md defines them for readers:

- A genuine pair shows one person, an impostor pair shows two. A pair matches if its score reaches a threshold.
- FMR, the false match rate, is the share of impostor pairs that match. FAR, the false accept rate, is the same.
- FNMR, the false non-match rate, is the share of genuine pairs that do not match.
- TAR, the true accept rate, is the share of genuine pairs that match: TAR = 1 − FNMR.
- TAR@FAR and FNMR@FMR are TAR and FNMR at the lowest threshold whose FAR or FMR is at most the given one.
- A mated probe shows a person of the gallery, an unmated probe shows nobody of the gallery.
- FPIR, the false positive identification rate, is the share of unmated probes that match anybody in the gallery.
- TPIR, the true positive identification rate, is the share of mated probes that find their person first and match.
- TPIR@FPIR is TPIR at the lowest threshold whose FPIR is at most the given one.
"""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fr_core.data.store import AnyPath, write_text_atomically
from fr_core.verify.pairs import Verification, tars

CURVE_POINTS = 400
SMALLER_IS_BETTER = re.compile(r"(^|[/_])(mfr|fnmr_at_fmr_1e-\d+|loss|seconds|mib)$")


def machine() -> dict[str, object]:
    """Describe the machine that the figures were measured on."""
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
    """Return whether smaller values of a figure are better: of an error, a loss, time or memory."""
    return bool(SMALLER_IS_BETTER.search(figure))


def make_report(command: str, figures: Mapping[str, float], **more: object) -> dict[str, object]:
    """Return the JSON object that every command writes: command, version, machine, figures and any other facts."""
    report: dict[str, object] = {
        "command": command,
        "version": version("bigface"),
        "machine": machine(),
        "figures": dict(figures),
    }
    return report | more


def write_report(path: AnyPath, content: Mapping[str, object]) -> None:
    """Write a report, whole or not at all.

    Raises:
        OSError: The path cannot be written.
        ValueError: A figure is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def verification_figures(result: Verification, prefix: str = "") -> dict[str, float]:
    """Return a verification as flat figures.

    They are accuracy, accuracy_std, threshold, pairs and tar_at_far_1e-2 and the like. ``_low`` and ``_high`` are the
    ends of 95 % intervals.
    """
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
    """Return the name of a rate in figures: 1e-2 for 0.01."""
    return f"1e-{round(-np.log10(far))}"


def markdown(table: Sequence[tuple[str, ...]]) -> str:
    """Return a table, header first, in Markdown."""
    lines = [table[0], tuple("---" for _ in table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def roc_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Plot the ROC of one or more nets: TAR over FAR, which has a log axis.

    Args:
        curves: Name of a net -> scores [P] and same [P] of its pairs.
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
    """Plot the DET of one or more nets: FNMR over FMR, both on log axes.

    Args:
        curves: Name of a net -> scores [P] and same [P] of its pairs.
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
    """Plot histograms of the cosines of same and of different pairs, and a threshold."""
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
    """Plot square uint8 images [N, H, W, 3] in rows of ``columns``."""
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
    """Return FARs evenly on a log axis, from one impostor pair to all, and TAR at each."""
    far = np.geomspace(1 / max(1, int((~same).sum())), 1, CURVE_POINTS)
    return far, tars(scores, same, far)


def _cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
