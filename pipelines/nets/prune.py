"""``bigface prune``: a net with fewer channels, as it is or fine-tuned with the unpruned net as the teacher."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from fr_core.config.nets import IResNetNet, MobileFaceNetNet
from fr_core.config.recipes import load_config
from fr_core.data.store import AnyPath, atomic_file
from fr_core.errors import UserError
from fr_core.nets.factory import UntrustedCode
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.open import Recogniser, open_net
from fr_core.nets.prune import narrower, pruned
from fr_core.train.mlflow_runs import log_verification
from fr_core.verify.report import verification_figures, write_report
from fr_core.verify.suites import verify
from pipelines.train import train

WEIGHTS = "pruned.safetensors"  # the net before its fine-tuning, in the folder of the run

Figures = dict[str, dict[str, float]]  # form of the net (whole, pruned, tuned) -> its figures


def prune(
    ref: str,
    out: AnyPath,
    ratios: Sequence[float],
    round_to: int = 1,
    importance: str = "l1",
    net: str | None = None,
    images: Path | None = None,
    pairs: Path | None = None,
    seen: Callable[[Recogniser], None] | None = None,
) -> Figures:
    """Drop a net's least important channels, and write what is left as bare weights with the net's config.

    Args:
        ref, net: as :func:`fr_core.nets.open.open_net` takes them.
        out: ``FILE.safetensors``.
        ratios, round_to: as :func:`fr_core.nets.prune.narrower` takes them.
        importance: as :func:`fr_core.nets.prune.pruned` takes it.
        images, pairs: what to verify both nets on.
        seen: gets the whole net as soon as it is open.

    Returns:
        For the nets ``whole`` and ``pruned``, and with pairs the figures of a verification:

        - parameters;
        - mmac: millions of multiplications in convolutions and linear layers for one image;
        - mib: size of weights and statistics.

    Raises:
        UserError: the net does not exist or cannot be pruned so, or the name of ``out`` is refused.
            The pairs cannot be read, or ``bigface[compress]`` is not installed.
        OSError: ``out`` cannot be written.
    """
    if not out.name.endswith(".safetensors"):
        raise UserError(f"{out}: call it FILE.safetensors; a run's folder needs data to fine-tune on: --data SHARDS")
    whole, section = _open(ref, net, ratios, round_to, seen)
    found = {"whole": _figures(whole, images, pairs)}
    _write(whole, section, importance, out)
    return found | {"pruned": _figures(open_net(out), images, pairs)}


def prune_and_tune(
    ref: str,
    out: AnyPath,
    ratios: Sequence[float],
    recipe: str,
    overrides: Iterable[str],
    round_to: int = 1,
    importance: str = "l1",
    net: str | None = None,
    workers: int = 1,
    in_process: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    seen: Callable[[Recogniser], None] | None = None,
) -> Figures:
    """Prune a net, and train what is left with the whole net as the teacher.

    Args:
        ref, ratios, round_to, importance, net, seen: as :func:`prune` takes them.
        out: folder of the run; it also gets the pruned net before its training, as ``pruned.safetensors``.
        recipe: recipe of the training, whose method has a teacher; its net is replaced by the pruned one.
        overrides: overrides of the recipe. All nets are verified on ``verify.pairs``.
        workers, in_process, resume, overwrite: as :func:`pipelines.train.train` takes them.

    Returns:
        The figures of :func:`prune`, and for the net ``tuned`` the same with the seconds of the training.

    Raises:
        UserError: an override of what pruning decides, or as :func:`prune` and :func:`pipelines.train.train`.
        OSError: ``out`` cannot be written.
    """
    overrides = list(overrides)
    decided = {"method.teacher": ref, "method.teacher_net": net, "init.backbone": str(out / WEIGHTS)}
    for override in overrides:
        if override.startswith(("net.", "net=", *(f"{key}=" for key in decided))):
            raise UserError(f"{override}: pruning decides this field: leave it out")
    whole, section = _open(ref, net, ratios, round_to, seen)
    by_pruning = [f"{key}={json.dumps(value)}" for key, value in decided.items() if value]
    config = load_config(recipe, [*overrides, *by_pruning], net=section)
    if overwrite or not (out / "run.json").is_file():
        _write(whole, section, importance, out / WEIGHTS)
    run = train(config, out, workers, in_process, resume, overwrite, str(recipe))
    images, pairs = (Path(place) if place else None for place in (config.verify.images, config.verify.pairs))
    nets = {"whole": whole, "pruned": open_net(out / WEIGHTS)}
    found = {form: _figures(one, images, pairs) for form, one in nets.items()}
    by_training = {name: value for name, value in run.items() if name in found["pruned"]}
    found["tuned"] = found["pruned"] | by_training | {"seconds": run["seconds"]}
    content = json.loads((out / "report.json").read_text())
    write_report(out / "report.json", content | {"command": "prune", "figures": run | flat(found)})
    log_verification(out, "prune", flat(found))
    return found


def flat(found: Figures) -> dict[str, float]:
    """Return all figures in one mapping: whole_parameters, pruned_parameters and so on."""
    return {f"{form}_{name}": value for form, one in found.items() for name, value in one.items()}


def table(found: Figures) -> list[tuple[str, ...]]:
    """Return a row for each net, header first."""
    columns = {"accuracy": "accuracy", "tar_at_far_1e-2": "TAR@1e-2", "tar_at_far_1e-3": "TAR@1e-3"}
    scores = [name for name in columns if name in found["whole"]]
    rows: list[tuple[str, ...]] = [("net", "parameters", "MMAC", "MiB", *(columns[name] for name in scores))]
    for form, one in found.items():
        size = (f"{one['parameters']:,}", f"{one['mmac']:,.1f}", f"{one['mib']:.2f}")
        rows.append((form, *size, *(f"{one[name]:.4f}" for name in scores)))
    return rows


def _open(
    ref: str,
    net: str | None,
    ratios: Sequence[float],
    round_to: int,
    seen: Callable[[Recogniser], None] | None,
) -> tuple[Recogniser, IResNetNet | MobileFaceNetNet]:
    try:
        whole = open_net(ref, net, changeable=True)
    except UntrustedCode:
        raise UserError(f"{ref}: nets of kind factory cannot be pruned: give an iresnet or a mobilefacenet") from None
    if seen:
        seen(whole)
    assert whole.config is not None
    return whole, narrower(whole.config, ratios, round_to)


def _write(whole: Recogniser, section: IResNetNet | MobileFaceNetNet, importance: str, out: AnyPath) -> None:
    assert isinstance(whole.net, IResNet | MobileFaceNet)
    smaller = pruned(whole.net, section, importance)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as part:
        save_file(smaller.state_dict(), part, {"net": section.model_dump_json()})


@torch.inference_mode()
def _figures(one: Recogniser, images: Path | None, pairs: Path | None) -> dict[str, float]:
    side = one.net.input_size
    with FlopCounterMode(display=False) as operations:
        one.net(torch.zeros(1, 3, side, side, device=one.device))
    tensors = one.net.state_dict().values()
    figures = {
        "parameters": sum(weight.numel() for weight in one.net.parameters()),
        "mmac": operations.get_total_flops() / 2e6,
        "mib": sum(tensor.nbytes for tensor in tensors) / 2**20,
    }
    return figures | (verification_figures(verify(one.embed, images, pairs, side).verification) if pairs else {})
