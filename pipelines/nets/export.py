"""``bigface export``: write a net as an ONNX file, and compare the two before the file takes its place.

In the file of a mixture of experts every expert runs for every image.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fr_core.data.synthetic import render_face
from fr_core.errors import UserError
from fr_core.nets.backbone import normalised
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import open_onnx, write_onnx
from fr_core.nets.open import Recogniser, open_net
from pipelines.timing import in_turns, least_cosine, one_thread

FACES = 8
ALLOWED = 1e-3  # largest 1 − cosine between the embeddings of both nets
REPEATS = 5


def check_name(out: Path) -> None:
    """Refuse a path that is no name of an ONNX file.

    Raises:
        UserError: the name ends otherwise, or a folder lies there.
    """
    if out.suffix != ".onnx":
        raise UserError(f"{out}: call it FILE.onnx; a checkpoint's backbone.safetensors already holds bare weights")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give FILE.onnx")


@torch.inference_mode()
def export(
    ref: str,
    out: Path,
    net: str | None = None,
    seen: Callable[[Recogniser], None] | None = None,
    trust_code: bool = False,
) -> dict[str, float]:
    """Fold a net's batch norm and write the net as ONNX; a quantised net is written in integers.

    The file's metadata holds the threshold and the accuracy of the net's newest verification.

    Args:
        ref, net, trust_code: as :func:`fr_core.nets.open.open_net` takes them.
        out: ``FILE.onnx``; weights of more than 1.5 GiB go into ``FILE.onnx.data``.
        seen: gets the net as soon as it is open.

    Returns:
        - mib: size of all files;
        - least_cosine: least cosine between both nets' embeddings of a drawn face;
        - max_difference: largest difference of an embedding's component, relative to the net's largest component;
        - net_ms, onnx_ms: milliseconds for one face on one thread.

    Raises:
        UserError: the net does not exist, is an ONNX file already, or has embeddings that are not finite or differ.
            The name of ``out`` is refused, or ``bigface[export]`` is not installed.
        OSError: ``out`` cannot be written.
    """
    check_name(out)
    recogniser = open_net(ref, net, torch.device("cpu"), changeable=True, trust_code=trust_code)
    if seen:
        seen(recogniser)
    size = recogniser.net.input_size
    faces_BHWC = torch.from_numpy(np.stack([render_face(identity, 0, size=size)[0] for identity in range(FACES)]))
    x_BCHW = normalised(faces_BHWC, recogniser.net)
    before_BD = recogniser.net(x_BCHW)
    if not before_BD.isfinite().all():
        raise UserError(f"{ref}: the net's embeddings are not finite: take an earlier checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    with one_thread(), TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        write_onnx(folded(recogniser.net), Path(folder) / out.name, recogniser.verified)
        opened = open_onnx(Path(folder) / out.name)
        after_BD = opened(x_BCHW)
        cosine = least_cosine(before_BD, after_BD)
        if not 1 - cosine <= ALLOWED:
            raise UserError(
                f"{ref}: ONNX Runtime's embeddings differ from the net's (cosine {cosine:.6f}): not written"
            )
        taken = in_turns({"net": partial(recogniser.net, x_BCHW[:1]), "onnx": partial(opened, x_BCHW[:1])}, REPEATS)
        files = sorted(Path(folder).iterdir(), reverse=True)  # FILE.onnx.data first, since FILE.onnx reads it
        mib = sum(file.stat().st_size for file in files) / 2**20
        for file in files:
            file.replace(out.with_name(file.name))
    difference = float((before_BD - after_BD).abs().max() / before_BD.abs().max())
    figures = {"mib": mib, "least_cosine": cosine, "max_difference": difference}
    return figures | {f"{name}_ms": statistics.median(times) for name, times in taken.items()}
