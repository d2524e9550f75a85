"""``bigface quantize``: a trained net in integers, after one epoch on few images with the float net as its teacher.

The training follows QuantFace (docs/methods/quantface.md) and is a run like any other: net.kind = "quantised",
method.kind = "quantface". The float net and the ONNX file are both verified, the file in ONNX Runtime.
"""

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fr_core.config import Config
from fr_core.config.nets import IResNetNet, MobileFaceNetNet, QuantisedNet
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.store import AnyPath
from fr_core.data.stream import make_plan
from fr_core.data.synthetic import render_face
from fr_core.errors import UserError
from fr_core.nets.backbone import normalised
from fr_core.nets.factory import UntrustedCode
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import INSTALL, installed, open_onnx, write_onnx
from fr_core.nets.open import Recogniser, open_float, open_net
from fr_core.train.mlflow_runs import log_verification
from fr_core.verify.report import verification_figures, write_report
from fr_core.verify.suites import verify
from pipelines.nets.export import check_name, export
from pipelines.timing import CPU, in_turns, one_thread
from pipelines.train import train

REPEATS = 20
MIB = 2**20
COLUMNS = {  # column of the summary -> figures before and after
    "accuracy %": ("before_accuracy", "after_accuracy"),
    "TAR@FAR 1e-3 %": ("before_tar_at_far_1e-3", "after_tar_at_far_1e-3"),
    "params × bits MiB": ("float_mib", "nominal_mib"),
    "file MiB": ("float_file_mib", "int8_file_mib"),
    "ms on one core": ("float_ms", "int8_ms"),
}


def quantised_config(
    ckpt: str,
    recipe: str,
    net: str | None = None,
    data_share: float = 1.0,
    calibrate_only: bool = False,
    overrides: Iterable[str] = (),
    seen: Callable[[Recogniser], None] | None = None,
    **fields: object,
) -> Config:
    """Return the config of a run that quantises a net.

    Args:
        ckpt, net: as :func:`fr_core.nets.open.open_net` takes them.
        data_share: share of an epoch's steps. The order is random, so it is also a random share of the images.
        calibrate_only: measure the activations' ranges and train no step.
        overrides: overrides of the recipe; they win over all other arguments.
        seen: gets the net as soon as it is open.
        fields: fields of the recipe with ``__`` for the dot, such as data__path; None keeps the recipe's value.

    Raises:
        UserError: the net cannot be quantised, the data share is out of range, or the recipe is refused by
            :func:`fr_core.config.recipes.load_config` or :func:`fr_core.data.stream.make_plan`.
    """
    given = {name.replace("__", "."): value for name, value in fields.items()}
    given |= {"init.backbone": ckpt, "init.net": net, "method.teacher": ckpt, "method.teacher_net": net}
    given |= {"train.epochs": 0} if calibrate_only else {}
    written, opened = load_config(recipe), float_net(ckpt, net)
    if seen:
        seen(opened)
    section = opened.config
    assert isinstance(section, IResNetNet | MobileFaceNetNet)
    if written.method.kind != "quantface":
        raise UserError(f'{recipe}: not a recipe of a quantisation: take one with method.kind = "quantface"')
    quantised = QuantisedNet(net=section)
    if isinstance(written.net, QuantisedNet):
        quantised = written.net.model_copy(update={"net": section})
    options = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if value is not None]
    config = load_config(recipe, [*options, *overrides], net=quantised)
    if not 0 < data_share <= 1:
        raise UserError(f"a data share of {data_share:g} is not in 0 … 1: to train nothing, give --calibrate-only")
    if data_share < 1:
        steps = make_plan(config, open_dataset(config.data.path)).steps_per_epoch
        options.append(f"train.max_steps={max(1, round(data_share * steps))}")
        config = load_config(recipe, [*options, *overrides], net=quantised)
    return config


def float_net(ckpt: str, net: str | None) -> Recogniser:
    """Open the net that is to be quantised, on the CPU.

    Raises:
        UserError: the net does not exist or cannot be quantised.
    """
    unfit = '{}: net.kind = "{}" cannot be quantised: take an iresnet or a mobilefacenet'
    try:
        opened = open_net(ckpt, net, torch.device("cpu"), changeable=True)
    except UntrustedCode:
        raise UserError(unfit.format(ckpt, "factory")) from None
    assert opened.config is not None
    if isinstance(opened.config, QuantisedNet):
        raise UserError(f"{ckpt} is quantised already: name the float net")
    if not isinstance(opened.config, IResNetNet | MobileFaceNetNet):
        raise UserError(unfit.format(ckpt, opened.config.kind))
    return opened


def quantize(
    config: Config,
    run: AnyPath,
    out: Path | None = None,
    workers: int = 1,
    in_process: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    recipe: str = "",
) -> dict[str, float]:
    """Train, export, verify and time a quantised net; the run's ``report.json`` holds all figures.

    Args:
        config: config of :func:`quantised_config`.
        out: ``FILE.onnx`` for the net in integers; None: only its simulation in floating point is verified.
        run, workers, in_process, resume, overwrite, recipe: as :func:`pipelines.train.train` takes them.

    Returns:
        The figures of the training, and these:

        - data_share: epochs trained;
        - float_mib, nominal_mib: parameters times their bits, where nominal_mib counts net.weights bits each;
        - minutes_per_epoch, if steps were timed;
        - before_…, after_…: both verifications, if verify.pairs is set;
        - int8_cosine, int8_file_mib and the figures of :func:`timed`, if an ONNX file was written. int8_cosine is
          least_cosine of :func:`pipelines.nets.export.export`.

    Raises:
        UserError: the file cannot be written, integer kernels cannot run the scheme, or training refuses.
    """
    assert isinstance(config.net, QuantisedNet)
    assert config.init.backbone
    if out:
        check_target(out, config.net)
    plain = open_float(config.net.net, config.init.backbone, config.init.net)
    before = Recogniser(plain.eval().requires_grad_(False), CPU)
    trained = train(config, run, workers, in_process, resume, overwrite, recipe)
    parameters = sum(weight.numel() for weight in before.net.parameters())
    figures = {"float_mib": parameters * 4 / MIB, "nominal_mib": parameters * config.net.weights / 8 / MIB}
    figures["data_share"] = trained["epochs"]
    if trained.get("images_per_second"):
        images = config.train.global_batch * trained["steps"] / trained["epochs"]
        figures["minutes_per_epoch"] = images / trained["images_per_second"] / 60
    figures |= verified(config, before, "before_")
    if out:
        exported = export(str(run), out)
        figures |= {"int8_cosine": exported["least_cosine"], "int8_file_mib": exported["mib"], **timed(before, out)}
        figures |= verified(config, open_net(out), "after_")
    elif config.verify.pairs:
        figures |= {f"after_{name}": value for name, value in trained.items() if f"before_{name}" in figures}
    content = json.loads((run / "report.json").read_text())
    content |= {"command": "quantize", "figures": trained | figures, "onnx": str(out) if out else None}
    write_report(run / "report.json", content)
    log_verification(run, "quantize", figures)
    return trained | figures


def check_target(out: Path, net: QuantisedNet) -> None:
    """Refuse a scheme that integer kernels cannot run, and a file that cannot be written.

    Raises:
        UserError: one of these, or ``bigface[export]`` is not installed.
    """
    if net.scheme != "integer":
        raise UserError(
            f'net.scheme = "{net.scheme}" gives every output channel its own zero point, which integer kernels refuse: '
            'leave --out out, or take a recipe with net.scheme = "integer"'
        )
    check_name(out)
    if not installed():
        raise UserError(f"{out}: ONNX files need: {INSTALL}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".quantize-"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def verified(config: Config, net: Recogniser, prefix: str) -> dict[str, float]:
    """Verify a net on the recipe's pairs; return its figures, or none without pairs."""
    if config.verify.pairs is None:
        return {}
    images = Path(config.verify.images) if config.verify.images else None
    result = verify(net.embed, images, Path(config.verify.pairs), net.net.input_size)
    return verification_figures(result.verification, prefix)


@torch.inference_mode()
def timed(net: Recogniser, int8: Path) -> dict[str, float]:
    """Time one face on one core in ONNX Runtime: the folded float32 net against the file of integers.

    Returns:
        float_file_mib, float_ms, int8_ms, and speedup: the median over turns of float_ms / int8_ms.
    """
    face_BHWC = torch.from_numpy(np.stack([render_face(0, 0, size=net.net.input_size)[0]]))
    x_BCHW = normalised(face_BHWC, net.net)
    with one_thread(), TemporaryDirectory(prefix="bigface-") as folder:
        write_onnx(folded(net.net), Path(folder) / "float.onnx")
        files = {"float": Path(folder) / "float.onnx", "int8": int8}
        taken = in_turns({name: partial(open_onnx(file), x_BCHW) for name, file in files.items()}, REPEATS)
        mib = sum(file.stat().st_size for file in Path(folder).iterdir()) / MIB
    speedup = statistics.median(a / b for a, b in zip(taken["float"], taken["int8"], strict=True))
    milliseconds = {f"{name}_ms": statistics.median(times) for name, times in taken.items()}
    return {"float_file_mib": mib, **milliseconds, "speedup": speedup}


def table(figures: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the net before and after in what was measured, header first."""
    columns = {column: names for column, names in COLUMNS.items() if names[0] in figures}
    rows: list[tuple[str, ...]] = [("net", *columns)]
    for place, net in enumerate(("float", "quantised")):
        shares = {column: 100 if column.endswith("%") else 1 for column in columns}
        rows.append((net, *(f"{shares[column] * figures[names[place]]:.2f}" for column, names in columns.items())))
    return rows


def summarised() -> set[str]:
    """Return the names of the figures that :func:`table` shows."""
    return {name for names in COLUMNS.values() for name in names}
