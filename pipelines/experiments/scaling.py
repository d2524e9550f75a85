"""``bigface scaling``: fit error against parameters over finished runs, and predict the error of the next size."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from fr_core.data.store import to_path
from fr_core.errors import UserError
from fr_core.train.metrics import report_figures
from fr_core.train.mlflow_runs import finished_runs
from fr_core.verify.scaling_law import ScalingLaw, fit_scaling_law

# The error of a share of right decisions is 1 − figure; other figures are errors themselves.
RIGHT = re.compile(r"(^|[/_])(accuracy|tar_(of_means_)?at_far_1e-\d+|rank_\d+|tpir_at_fpir_1e-\d+)$")
WRONG = re.compile(r"(^|[/_])(mfr|fnmr_at_fmr_1e-\d+|loss)$")
FACTORS = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
CURVE_POINTS = 200


@dataclass(frozen=True)
class Run:
    """One point of the law."""

    name: str
    parameters: int  # of backbone and classifier together
    error: float


@dataclass(frozen=True)
class Scaling:
    """A law, and the runs that it was fitted to."""

    runs: list[Run]  # smallest first
    left_out: list[tuple[str, str]]  # run, reason
    law: ScalingLaw
    size: float  # parameters of the net whose error is predicted


def scaling(folders: list[str], figure: str, uri: str, experiment: str, query: str, predict: str | None) -> Scaling:
    """Fit the scaling law over finished runs.

    Args:
        folders: folders of runs; if there are none, the runs of an MLflow experiment are taken.
        figure: a share of right decisions such as accuracy or tar_at_far_1e-3, or an error such as mfr.
            A later verification's figure in MLflow is called NAME/FIGURE.
        uri, experiment, query: database or server, experiment and filter of MLflow, as for
            :func:`fr_core.train.mlflow_runs.search_mlflow`.
        predict: parameters of the predicted net, such as 600M or 1.2e9; None: twice those of the largest run.

    Raises:
        UserError: ``figure`` has no error, ``predict`` is no number, both folders and a filter are given, or the runs
            have fewer than three sizes.
    """
    if not RIGHT.search(figure) and not WRONG.search(figure):
        raise UserError(
            f"--figure {figure}: not a share such as accuracy or tar_at_far_1e-3, nor an error such as mfr: name one"
        )
    if folders and query:
        raise UserError("--filter asks MLflow, not folders: leave out --filter or the folders")
    size = None if predict is None else parameter_count(predict)
    named = [(folder, partial(report_figures, to_path(folder))) for folder in folders]
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    for name, read in named or finished_runs(uri, experiment, query):
        try:
            runs.append(run_of(name, read(), figure))
        except UserError as error:
            left_out.append((name, str(error)))
    runs.sort(key=lambda run: (run.parameters, run.name))
    sizes, errors = np.array([run.parameters for run in runs]), np.array([run.error for run in runs])
    try:
        law = fit_scaling_law(sizes, errors)
    except UserError as error:
        first = "".join(
            f"; {len(left_out)} runs are left out, such as {name}: {reason}" for name, reason in left_out[:1]
        )
        raise UserError(f"{error}{first}") from None
    return Scaling(runs, left_out, law, size or 2.0 * runs[-1].parameters)


def run_of(name: str, figures: Mapping[str, float], figure: str) -> Run:
    """Return a run as a point of the law.

    Raises:
        UserError: the run lacks the figure, or no power law passes through its error.
    """
    if figure not in figures:
        raise UserError(f"no figure {figure}")
    error = 1 - figures[figure] if RIGHT.search(figure) else figures[figure]
    if not (math.isfinite(error) and error > 0):
        raise UserError(f"its error is {error:g}, through which no power law passes")
    return Run(name, int(figures["backbone_parameters"] + figures["classifier_parameters"]), error)


def parameter_count(text: str) -> float:
    """Read a number of parameters: '1.2e9', '1.2G', '1.2B' and '1200M' are all 1.2e9.

    Raises:
        UserError: the text is not a number from 1 on.
    """
    number, factor = (text[:-1], FACTORS[text[-1]]) if text[-1:] in FACTORS else (text, 1.0)
    try:
        count = factor * float(number)
    except ValueError:
        count = math.nan
    if not 1 <= count < math.inf:
        raise UserError(f"--predict {text}: not a number of parameters, such as 600M or 1.2e9")
    return count


def run_table(found: Scaling) -> list[tuple[str, ...]]:
    """Return the runs with their error and the law's, header first."""
    fitted = found.law.at(np.array([run.parameters for run in found.runs])).error
    rows = zip(found.runs, fitted, strict=True)
    return [
        ("run", "parameters", "error", "fitted"),
        *((run.name, f"{run.parameters:,}", f"{run.error:.4g}", f"{fit:.4g}") for run, fit in rows),
    ]


def scaling_figures(found: Scaling) -> dict[str, float]:
    """Return flat figures of the law E = offset + prefactor · P^(−exponent), and of the predicted run."""
    law, estimate = found.law, found.law.at(np.array([found.size]))
    figures = {
        "runs": len(found.runs),
        "left_out": len(found.left_out),
        "exponent": law.exponent,
        "exponent_low": law.exponent_interval[0],
        "exponent_high": law.exponent_interval[1],
        "prefactor": law.prefactor,
        "offset": law.offset,
        "r2": law.r2,
        "predicted_parameters": round(found.size),
        "predicted_error": float(estimate.error[0]),
        "predicted_error_low": float(estimate.run_low[0]),
        "predicted_error_high": float(estimate.run_high[0]),
    }
    return figures if law.offset_p is None else figures | {"offset_p": law.offset_p}


def findings(found: Scaling) -> list[str]:
    """Return sentences: whether the law has an offset, and whether the error falls with size at all."""
    law = found.law
    if law.offset_p is None:
        sentences = ["Three sizes do not tell whether the law has an offset: an error that no size mends."]
    else:
        test = f"(F test, p = {law.offset_p:.2g})"
        with_offset = f"The law has an offset {test}: an error that no size mends."
        without = f"These runs show no offset {test}. If there is one, larger nets gain less than predicted."
        sentences = [with_offset if law.offset else without]
    if law.exponent_interval[0] <= 0:
        sentences.append("The exponent's interval reaches down to 0: these runs do not show that size helps.")
    return sentences


def scaling_figure(found: Scaling, figure: str) -> Figure:
    """Draw the runs, the law with its 95 % band, and the prediction with the interval of a single run.

    Both axes are logarithmic.
    """
    sizes, law = np.array([run.parameters for run in found.runs]), found.law
    line = np.geomspace(min(sizes[0], found.size), max(sizes[-1], found.size), CURVE_POINTS)
    curve, point = law.at(line), law.at(np.array([found.size]))
    picture = Figure(figsize=(6, 5), layout="constrained")
    axes = picture.subplots()
    offset = f"{law.offset:.3g} + " if law.offset else ""
    axes.fill_between(line, curve.curve_low, curve.curve_high, alpha=0.2, label="95 % interval of the law")
    axes.plot(line, curve.error, linewidth=1, label=f"{offset}{law.prefactor:.3g} · P^{-law.exponent:.3g}")
    axes.scatter(sizes, [run.error for run in found.runs], s=16, color="black", zorder=3, label="runs")
    arms = np.stack([point.error - point.run_low, point.run_high - point.error])
    axes.errorbar(
        [found.size], point.error, arms, fmt="D", color="C3", capsize=3, label="predicted, 95 % interval of a run"
    )
    name = f"1 − {figure}" if RIGHT.search(figure) else figure
    axes.set(xscale="log", yscale="log", xlabel="parameters, backbone + classifier", ylabel=f"error, {name}")
    ticks = ((axes.xaxis, (1, 3), EngFormatter(sep="")), (axes.yaxis, (1, 2, 5), StrMethodFormatter("{x:g}")))
    for axis, digits, form in ticks:
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())
    axes.set_title("Scaling law")
    axes.grid(alpha=0.3, which="both")
    picture.legend(loc="outside lower center", ncols=2)
    return picture
