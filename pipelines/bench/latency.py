"""``bigface bench latency``: milliseconds from a photo to its embedding, one image at a time on one core.

Legend: B batch, C channels, H W pixels.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from fr_core.config.nets import GhostFaceNetNet, IResNetNet, MobileFaceNetNet, Net, ViTNet
from fr_core.data.crops import encode, similarity, warped
from fr_core.data.photos import read_rgb
from fr_core.data.synthetic import render_face
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.build import build_net, on_device
from fr_core.nets.fold_bn import folded
from fr_core.nets.iresnet import BLOCKS
from fr_core.nets.onnx_net import OnnxNet, installed, open_onnx, write_onnx
from fr_core.nets.open import open_net
from pipelines.timing import CPU, in_turns, least_cosine, one_thread

VITS = (ViTNet(width=256), ViTNet(), ViTNet(depth=24))  # insightface's ViT-T, ViT-S and ViT-B
IRESNETS = (IResNetNet.model_validate({"depth": depth}) for depth in BLOCKS)
NETS: tuple[Net, ...] = (MobileFaceNetNet(), GhostFaceNetNet(), *VITS, *IRESNETS)
PHOTO = (750, 1000)  # height and width of the photo, pixels
FACE_SCALE = 2.5  # size of the face in the photo ÷ size of the template
SETTLING = 4  # images that set the norms of a random net
FORMS = ("plain", "folded", "onnx")


def bench_latency(
    model: str | None,
    net: str | None,
    budget_ms: float,
    repeats: int,
    say: Callable[[str], None],
    nets: Sequence[Net] = NETS,
    trust_code: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Time nets in float32 on one thread: as they train, with batch norm folded, and folded in ONNX Runtime.

    An answer decodes a photo, aligns it by known points, normalises it and runs one forward pass. It has no mirrored
    image and no detector. ONNX Runtime is left out where it is not installed. The deepest random net takes 2.6 GiB for
    each of its three forms, and more during its export.

    Args:
        model: one net instead of ``nets``, as :func:`fr_core.nets.open.open_net` takes it.
        net: what the model's bare weights are, as for :func:`fr_core.nets.open.open_net`.
        budget_ms: time limit of an answer.
        repeats: timed turns of each form.
        say: function that shows a line of progress.
        nets: nets with random weights, measured if there is no ``model``.
        trust_code: run the code that the model names, as :func:`fr_core.nets.open.open_net` does.

    Returns:
        A row for each net, and the figures budget_ms, align_ms, nets and fitting. A row has ``net``, ``parameters``,
        ``FORM_ms`` and ``plain_over_FORM`` (medians over the turns), ``answer_ms`` with the fastest form, and ``fits``.

    Raises:
        UserError: the model does not open.
        RuntimeError: the forms' embeddings differ.
    """
    with one_thread():
        align_ms = _align_ms(repeats)
        if model is not None:
            opened = open_net(model, net, CPU, trust_code=trust_code)
            rows = [_row(model, opened.net, align_ms, budget_ms, repeats, say)]
        else:
            rows = [_row(name_of(config), settled(config), align_ms, budget_ms, repeats, say) for config in nets]
    fitting = sum(row["fits"] for row in rows)
    return rows, {"budget_ms": budget_ms, "align_ms": align_ms, "nets": len(rows), "fitting": fitting}


def name_of(config: Net) -> str:
    """Return the name of a net, such as iresnet50, or vit512x12: width and depth."""
    match config:
        case IResNetNet():
            return f"iresnet{config.depth}"
        case ViTNet():
            return f"vit{config.width}x{config.depth}"
        case _:
            return config.kind


@torch.no_grad()
def settled(config: Net) -> Backbone:
    """Build a random net whose norms have the statistics of a batch of noise, so that a deep net does not overflow."""
    net = on_device(build_net(config), CPU)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    random = torch.Generator().manual_seed(0)
    net.train()(torch.randn(SETTLING, 3, net.input_size, net.input_size, generator=random))
    return net.eval()


@torch.inference_mode()
def _row(
    name: str, net: Backbone, align_ms: float, budget_ms: float, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    with TemporaryDirectory(prefix="bigface-") as folder:
        forms = {"onnx": net} if isinstance(net, OnnxNet) else _forms(net, Path(folder))
        faces_BHWC = torch.from_numpy(np.stack([render_face(0, 0, size=net.input_size)[0]]))
        x_BCHW = normalised(faces_BHWC, net)
        first, *others = (form(x_BCHW) for form in forms.values())
        if any(not least_cosine(first, other) >= 0.999 for other in others):
            raise RuntimeError(f"embeddings of {name} differ: plain, folded, ONNX")
        taken = in_turns({name: partial(form, x_BCHW) for name, form in forms.items()}, repeats)
    row: dict[str, Any] = {"net": name, "parameters": sum(weight.numel() for weight in net.parameters())}
    row |= {f"{form}_ms": statistics.median(times) for form, times in taken.items()}
    for form in [form for form in taken if form != "plain" and "plain" in taken]:
        turns = zip(taken["plain"], taken[form], strict=True)
        row[f"plain_over_{form}"] = statistics.median(plain / other for plain, other in turns)
    row["answer_ms"] = align_ms + min(row[f"{form}_ms"] for form in taken)
    row["fits"] = row["answer_ms"] <= budget_ms
    say(f"{name}: " + ", ".join(f"{form} {row[f'{form}_ms']:,.1f} ms" for form in taken))
    return row


def _forms(net: Backbone, folder: Path) -> dict[str, nn.Module]:
    inference = on_device(folded(net), CPU)
    forms: dict[str, nn.Module] = {"plain": net, "folded": inference}
    if installed():
        write_onnx(inference, folder / "net.onnx")
        forms["onnx"] = open_onnx(folder / "net.onnx")
    return forms


def _align_ms(repeats: int) -> float:
    """Return the median milliseconds from a photo's JPEG and its face's five points to a normalised crop."""
    face, points = render_face(0, 0)
    image = np.full((*PHOTO, 3), 127, np.uint8)
    place = np.array([[FACE_SCALE, 0, 300], [0, FACE_SCALE, 200]], np.float32)
    cv2.warpAffine(face, place, PHOTO[::-1], dst=image, borderMode=cv2.BORDER_TRANSPARENT)
    jpeg, points = encode(image), points @ place[:, :2].T + place[:, 2]

    def aligned() -> Tensor:
        crop = warped(read_rgb(jpeg), similarity(points, 112), 112)
        return normalised(torch.from_numpy(crop[None]), Backbone())

    return statistics.median(in_turns({"align": aligned}, repeats)["align"])


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows as a table, header first."""
    cells: list[tuple[str, ...]] = [
        ("net", "parameters", "plain ms", "folded ms", "ONNX ms", "plain/folded", "plain/ONNX", "answer ms", "fits")
    ]
    for row in rows:
        times = [f"{row[f'{form}_ms']:,.1f}" if f"{form}_ms" in row else "" for form in FORMS]
        names = [f"plain_over_{form}" for form in FORMS[1:]]
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in names]
        end = (f"{row['answer_ms']:,.1f}", "yes" if row["fits"] else "no")
        cells.append(
            (row["net"], f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "", *times, *ratios, *end)
        )
    return cells
