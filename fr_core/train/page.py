"""What MLflow's page of a run tells: tags, a description, the datasets, and the sections of the charts.

MLflow sorts charts by name, and charts without a section come last. So the curves that people look at first have the
section that sorts first, and single figures have none.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from fr_core.config import Config
from fr_core.config.nets import IResNetNet
from fr_core.data.schema import Dataset, sha256
from fr_core.data.store import AnyPath, to_path
from fr_core.losses.ekd import THRESHOLDS
from fr_core.nets.names import config_name
from fr_core.verify.report import markdown

ORIGIN = "origin.json"  # in a run's folder: how the run was started; pipelines/origin.py writes it
NOTE = "mlflow.note.content"  # MLflow's tag of a description, in Markdown
DIGEST = 32  # letters of a checksum; MLflow takes 36
SECTIONS = {
    "curves": ("loss", "lr", "accuracy", "detector", "stationary"),
    "gradients": ("grad_norm", "head_grad_norm"),
    "losses": ("margin_loss", "distill_loss", "positive_loss", "negative_loss"),
    "speed": ("images_per_second", "data_wait"),
    "thresholds": THRESHOLDS,
}
CHARTS = {name: f"{section}/{name}" for section, names in SECTIONS.items() for name in names}
NO_CHARTS = ("step", "epoch")  # MLflow's charts have the step as their axis
CHOOSE_VIEW = "MLflow may open another view: choose **Training runs** on the left, or **Model training** above it."


def chart_name(metric: str) -> str:
    """Return the name that a metric of a training step or of a verification has in MLflow: ``SECTION/METRIC``."""
    return CHARTS.get(metric, f"verification/{metric}")


def read_origin(out: AnyPath) -> dict[str, str]:
    """Read how a run was started: command, recipe, commit, host and user; empty if its folder does not tell."""
    path = out / ORIGIN
    return json.loads(path.read_text()) if path.is_file() else {}


def run_tags(config: Config, origin: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run: what was trained on what, from which source, by whom and where."""
    width = f" width {config.net.width}" if isinstance(config.net, IResNetNet) else ""
    facts = {
        "method": config.method.kind,
        "net": f"{config_name(config.net)}{width}",
        "data": config.data.path or "",
        **origin_tags(origin),
    }
    return {name: value for name, value in facts.items() if value}


def origin_tags(origin: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of any MLflow run that tell how it was started. MLflow shows some as source, version and user."""
    tags = {
        "recipe": origin.get("recipe", ""),
        "commit": origin.get("commit", ""),
        "host": origin.get("host", ""),
        "mlflow.user": origin.get("user", ""),
        "mlflow.source.name": " ".join(origin.get("command", "").split()[:2]),
        "mlflow.source.type": "LOCAL" if origin else "",
        "mlflow.source.git.commit": origin.get("commit", ""),
    }
    return {name: value for name, value in tags.items() if value}


def data_inputs(config: Config, dataset: Dataset) -> dict[str, dict[str, str]]:
    """Return the datasets of a run as MLflow shows them, by what the run does with them."""
    manifest, pairs = dataset.manifest, config.verify.pairs
    counts = {"identities": manifest.identities, "images": manifest.images}
    inputs = {"training": _dataset(str(dataset.root), dataset.stamp, counts)}
    if pairs:
        images = {"images": config.verify.images or "in the file of pairs"}
        inputs["verification"] = _dataset(pairs, sha256(to_path(pairs)), images)
    return inputs


def _dataset(source: str, checksum: str, profile: Mapping[str, object]) -> dict[str, str]:
    scheme = source.partition("://")[0] if "://" in source else "local"
    return {
        "name": "/".join(PurePath(source).parts[-2:]),
        "digest": checksum[:DIGEST],
        "source_type": scheme,
        "source": json.dumps({"uri": source}),
        "profile": json.dumps(profile),
    }


def describe(
    origin: Mapping[str, str], found: str = "The run has not ended yet.", table: Sequence[tuple[str, ...]] = ()
) -> str:
    """Return the description of an MLflow run in Markdown: what was found, the command that started it, and a table."""
    command = origin.get("command")  # between backticks it wraps, as a block of code it would not
    return "\n\n".join([found, *([f"`{command}`"] if command else []), *([markdown(table)] if table else [])])


def figures_table(figures: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return all figures of a run's report as a table, header first."""
    return [("figure", "value"), *((name, _as_text(value)) for name, value in figures.items())]


def headline(figures: Mapping[str, float]) -> str:
    """Return the chief figures of a run in one line of Markdown."""
    if "accuracy" not in figures:
        loss = f"loss {figures['loss']:.4g}" if "loss" in figures else "no step was logged"
        return f"**{loss}** after {figures['steps']:,.0f} steps; no pairs to verify on."
    ends = [f"{100 * figures[name]:.1f}" for name in ("accuracy_low", "accuracy_high") if name in figures]
    interval = f" ({' … '.join(ends)})" if ends else ""
    tars = [f"TAR@FAR {name.removeprefix('tar_at_far_')} {figures[name]:.3f}" for name in figures if _is_tar(name)]
    found = ", ".join([f"**accuracy {100 * figures['accuracy']:.1f} %**{interval}", *tars])
    return f"{found}, on {figures['pairs']:,.0f} pairs."


def _is_tar(figure: str) -> bool:
    return figure.startswith("tar_at_far_") and not figure.endswith(("_low", "_high"))


def _as_text(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
