"""``bigface bench quant``: integer nets against float32, in ONNX Runtime on one core (docs/quantisation.md).

Legend: B batch, C channels, H W pixels.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, QuantisedNet
from fr_core.data.synthetic import render_face
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.fold_bn import folded
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.onnx_net import INSTALL, installed, open_onnx, saturates, write_onnx
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from pipelines.bench.latency import name_of, settled
from pipelines.timing import CPU, in_turns, least_cosine, one_thread

FloatNet = IResNetNet | MobileFaceNetNet
NETS: tuple[FloatNet, ...] = (MobileFaceNetNet(), IResNetNet(depth=18))
FACES = 16  # drawn faces that calibrate a net
FORMS = ("int8", "float", "plain")


def bench_quant(
    model: str | None,
    net: str | None,
    weights: int,
    activations: int,
    repeats: int,
    say: Callable[[str], None],
    nets: Sequence[FloatNet] = NETS,
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, object]]:
    """Time nets as three ONNX files that take turns: int8, float and plain.

    ``int8`` holds integers, calibrated on drawn faces. ``float`` is float32 as ``bigface export`` writes it. ``plain``
    is float32 as PyTorch exports it, with PReLU as one operator.

    Args:
        model: one net instead of ``nets``, as :func:`fr_core.nets.open.open_net` takes it.
        net: what the model's bare weights are, as for :func:`fr_core.nets.open.open_net`.
        weights: bits of the weights.
        activations: bits of the activations.
        repeats: timed turns of each file.
        say: function that shows a line of progress.
        nets: nets with random weights, measured if there is no ``model``.

    Returns:
        A row for each net with ``net``, ``FORM_ms`` and ``FORM_mib``, then figures, then facts of the processor.
        Figures of a net are ``speedup_NET`` over plain, ``speedup_over_float_NET``, ``size_ratio_NET`` to float, and
        ``least_cosine_NET`` to the quantised net in PyTorch.

    Raises:
        UserError: the model does not open, is quantised or a mixture of experts, or packages are not installed.
    """
    if not installed():
        raise UserError(f"ONNX Runtime is not installed: {INSTALL}")
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    with one_thread():
        for config, name, plain in _nets(model, net, nets):
            quantised = _calibrated(plain, QuantisedNet(net=config, weights=weights, activations=activations))
            row, found = _row(plain, quantised, repeats)
            say(f"{name}: " + ", ".join(f"{form} {row[f'{form}_ms']:,.2f} ms" for form in FORMS))
            rows.append({"net": name} | row)
            figures |= {f"{figure}_{name}": value for figure, value in found.items()}
    processor = {
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
        "exact_kernels": saturates(weights),  # x64quantprecision: the fastest kernels would clip
    }
    return rows, figures, processor


def _nets(model: str | None, net: str | None, nets: Sequence[FloatNet]) -> Iterator[tuple[FloatNet, str, Backbone]]:
    """Yield the config, the name and the module of each net."""
    if model is None:
        yield from ((config, short_name(config), settled(config)) for config in nets)
        return
    opened = open_net(model, net, CPU)
    if not isinstance(opened.config, IResNetNet | MobileFaceNetNet):
        raise UserError(
            f"{model}: no float IR-ResNet or MobileFaceNet, which alone can be quantised here: give another model"
        )
    yield opened.config, short_name(opened.config), opened.net


def short_name(config: FloatNet) -> str:
    """Return the short name of a net, such as r50."""
    return name_of(config).replace("iresnet", "r")


def _calibrated(plain: Backbone, config: QuantisedNet) -> Backbone:
    from fr_core.nets.calibration import calibrate
    from fr_core.nets.quantised import Quantised

    assert isinstance(plain, IResNet | MobileFaceNet)
    net = Quantised(plain, config)
    calibrate(net, lambda: [_faces(net)], Ranks(), config)
    return net.requires_grad_(False)


def _faces(net: Backbone) -> torch.Tensor:
    faces_BHWC = np.stack([render_face(identity, 0, size=net.input_size)[0] for identity in range(FACES)])
    return normalised(torch.from_numpy(faces_BHWC), net)


@torch.inference_mode()
def _row(plain: Backbone, quantised: Backbone, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    x_BCHW = _faces(plain)
    with TemporaryDirectory(prefix="bigface-") as folder:
        files = {form: Path(folder) / f"{form}.onnx" for form in FORMS}
        write_onnx(quantised, files["int8"])
        write_onnx(folded(plain), files["float"])
        write_onnx(folded(plain), files["plain"], plain=True)
        opened = {form: open_onnx(file) for form, file in files.items()}
        taken = in_turns({form: partial(net, x_BCHW[:1]) for form, net in opened.items()}, repeats)
        row = {f"{form}_ms": statistics.median(times) for form, times in taken.items()}
        row |= {f"{form}_mib": file.stat().st_size / 2**20 for form, file in files.items()}
        cosine = least_cosine(quantised(x_BCHW), opened["int8"](x_BCHW))

    def ratio(form: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[form], taken["int8"], strict=True))

    found = {"speedup": ratio("plain"), "speedup_over_float": ratio("float")}
    return row, found | {"size_ratio": row["int8_mib"] / row["float_mib"], "least_cosine": cosine}


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows as a table, header first."""
    header = ("net", *(f"{form} {unit}" for unit in ("ms", "MiB") for form in FORMS))
    names = [f"{form}_{unit}" for unit in ("ms", "mib") for form in FORMS]
    return [header, *((row["net"], *(f"{row[name]:,.2f}" for name in names)) for row in rows)]
