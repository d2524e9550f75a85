"""``bigface prune``: a net with fewer channels, as it is or fine-tuned by the net that it was."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from fr_core.config.nets import IResNetNet, MobileFaceNetNet
from fr_core.config.recipes import load_config, parse_config
from fr_core.data.store import AnyPath, atomic_file
from fr_core.errors import UserError
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.open import Recogniser, open_net
from fr_core.nets.prune import narrower, pruned
from fr_core.train.mlflow_runs import log_verification
from fr_core.verify.report import verification_figures, write_report
from fr_core.verify.suites import verify
from pipelines.train import train

WEIGHTS = "pruned.safetensors"  # in the folder of the run that fine-tunes them

Figures = dict[str, dict[str, float]]  # of the nets whole, pruned and tuned


def prune(
    ref: str,
    out: AnyPath,
    ratios: Sequence[float],
    round_to: int = 1,
    importance: str = "l1",
    net: str | None = None,
    images: Path | None = None,
    pairs: Path | None = None,
) -> Figures:
    """Writes the most important channels of a net as bare weights, which tell what net they are.

    Args:
        ref, net: as :func:`fr_core.nets.open.open_net` takes them.
        out: ``FILE.safetensors``.
        ratios, round_to: as :func:`fr_core.nets.prune.narrower` takes them.
        images, pairs: to verify both nets on.

    Returns:
        Of ``whole`` and ``pruned``: parameters, mmac (multiplications in convolutions and linear layers for an image,
        in millions), mib (of weights and statistics), and a verification's figures where there are pairs.

    Raises:
        UserError: no such net, one that cannot be pruned so, another kind of file asked for, pairs that cannot be
            read, or torch-pruning is not installed.
        OSError: ``out`` cannot be written.
    """
    if not out.name.endswith(".safetensors"):
        raise UserError(f"{out}: call it FILE.safetensors; a run's folder needs data to fine-tune on: --data SHARDS")
    whole, section = _open(ref, net, ratios, round_to)
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
) -> Figures:
    """Prunes a net and trains what is left, with the whole net as the teacher.

    Args:
        out: the run's folder; the pruned net before its training comes to lie there as ``pruned.safetensors``.
        recipe, overrides: of the training, a method with a teacher; the net is the pruned one, whatever the recipe
            says. All nets are verified on ``verify.pairs``.
        workers, in_process, resume, overwrite: as :func:`pipelines.train.train` takes them.

    Returns:
        As :func:`prune`, and of ``tuned`` the same with the training's seconds.

    Raises:
        UserError: as :func:`prune` and :func:`pipelines.train.train`, or overrides of what pruning decides.
        OSError: ``out`` cannot be written.
    """
    overrides = list(overrides)
    decided = {"method.teacher": ref, "method.teacher_net": net, "init.backbone": str(out / WEIGHTS)}
    for override in overrides:
        if override.startswith(("net.", "net=", *(f"{key}=" for key in decided))):
            raise UserError(f"{override}: pruning decides that itself")
    whole, section = _open(ref, net, ratios, round_to)
    config = load_config(
        recipe, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in decided.items() if value)]
    )
    config = parse_config(config.model_dump() | {"net": section.model_dump()}, recipe)
    if overwrite or not (out / "run.json").is_file():
        _write(whole, section, importance, out / WEIGHTS)
    run = train(config, out, workers, in_process, resume, overwrite)
    images, pairs = (Path(place) if place else None for place in (config.verify.images, config.verify.pairs))
    nets = {"whole": whole, "pruned": open_net(out / WEIGHTS)}
    found = {form: _figures(one, images, pairs) for form, one in nets.items()}
    found["tuned"] = found["pruned"] | {name: value for name, value in run.items() if name in found["pruned"]}
    found["tuned"]["seconds"] = run["seconds"]
    content = json.loads((out / "report.json").read_text())
    write_report(out / "report.json", content | {"command": "prune", "figures": run | flat(found)})
    log_verification(out, "prune", flat(found))
    return found


def flat(found: Figures) -> dict[str, float]:
    """whole_parameters, pruned_parameters, …"""
    return {f"{form}_{name}": value for form, one in found.items() for name, value in one.items()}


def table(found: Figures) -> list[tuple[str, ...]]:
    """Header first."""
    columns = {"accuracy": "accuracy", "tar_at_far_1e-2": "TAR@1e-2", "tar_at_far_1e-3": "TAR@1e-3"}
    scores = [name for name in columns if name in found["whole"]]
    rows: list[tuple[str, ...]] = [("net", "parameters", "MMAC", "MiB", *(columns[name] for name in scores))]
    for form, one in found.items():
        size = (f"{one['parameters']:,}", f"{one['mmac']:,.1f}", f"{one['mib']:.2f}")
        rows.append((form, *size, *(f"{one[name]:.4f}" for name in scores)))
    return rows


def _open(
    ref: str, net: str | None, ratios: Sequence[float], round_to: int
) -> tuple[Recogniser, IResNetNet | MobileFaceNetNet]:
    whole = open_net(ref, net)
    if whole.config is None:
        raise UserError(f"{ref}: an ONNX file is not pruned; give the run or weights that it was exported from")
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
