"""Opens any backbone: a run, a checkpoint, bare weights with the name of their net, or an ONNX file.

No head is needed. Legend: N images, B batch, C channels, H W pixels, D embedding.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, Net
from fr_core.data.decode import resized
from fr_core.data.store import AnyPath, local_copy, to_path
from fr_core.device import default_device
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.build import build_float_net, build_net, on_device
from fr_core.nets.checkpoint_files import BACKBONE, find_checkpoint, weights_file
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import LAYERS, MobileFaceNet, from_mxnet
from fr_core.nets.moe import Mixture
from fr_core.nets.names import NAMES, article, config_name, parse_name, refuse_other_net, weights_name
from fr_core.nets.onnx_net import OnnxNet, open_onnx
from fr_core.nets.verifications import Verified, verification_of


@dataclass
class Recogniser:
    """A backbone in eval mode, ready to embed images."""

    net: Backbone | OnnxNet
    device: torch.device
    verified: Verified | None = None  # newest verification, if any
    config: Net | None = None  # what the net is; an ONNX file does not say
    checkpoint: AnyPath | None = None  # the folder that it was opened from, if that is a checkpoint

    @property
    def threshold(self) -> float | None:
        """Return the cosine from which two faces are one person, if a verification measured it."""
        return self.verified.threshold if self.verified else None

    @torch.inference_mode()
    def embed(
        self,
        images_NHWC: np.ndarray,
        flip: bool = True,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
        normalise: bool = True,
    ) -> np.ndarray:
        """Return the embeddings of aligned face crops.

        Args:
            images_NHWC: uint8 [N, H, W, 3], RGB, of any size; they are resized to the net's input.
            flip: Add the embedding of the mirrored image, as verification protocols do.
            batch: Images in one forward pass.
            progress: Function that is called with the number of images after each batch.
            normalise: Scale embeddings to length 1. Template protocols need the original lengths.

        Returns:
            float32 [N, D].

        Raises:
            ValueError: The images have another shape or dtype.
        """
        images_NHWC = np.asarray(images_NHWC)
        if images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3 or images_NHWC.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, 3], not {images_NHWC.dtype} {images_NHWC.shape}")
        embeddings = np.empty((len(images_NHWC), self.net.embedding), np.float32)
        for start in range(0, len(images_NHWC), batch):
            chunk = np.stack([resized(image, self.net.input_size) for image in images_NHWC[start : start + batch]])
            x_BCHW = normalised(torch.from_numpy(chunk).to(self.device), self.net)
            out_BD = self.net(x_BCHW)
            if flip:
                out_BD = out_BD + self.net(x_BCHW.flip(3))
            out_BD = nn.functional.normalize(out_BD) if normalise else out_BD
            embeddings[start : start + batch] = out_BD.cpu().numpy()
            if progress:
                progress(len(chunk))
        return embeddings


def open_net(ref: str | AnyPath, net: str | None = None, device: torch.device | None = None) -> Recogniser:
    """Open a backbone.

    Args:
        ref: Folder of a run or of a checkpoint, a ``.safetensors`` file, or an ``.onnx`` file of ``bigface export``,
            which runs on the CPU. Local path or URL.
        net: Name of the net for bare weights: ``mobilefacenet`` or ``iresnetDEPTH``, such as ``iresnet50``. Widths,
            input size and embedding are read off the weights. Every other ``ref`` names its net itself; then this
            name must agree.
        device: Device of the net; None: :func:`fr_core.device.default_device`.

    Raises:
        UserError: Nothing is there, files are damaged, weights do not fit the net, or ``net`` is missing or wrong.
    """
    device = device or default_device()
    path = to_path(ref)
    if path.is_file() and path.name.endswith(".onnx"):
        with local_copy(path) as local:
            onnx_net = open_onnx(local)
        refuse_other_net(path, net, onnx_net.name)
        return Recogniser(onnx_net, torch.device("cpu"), onnx_net.verified)
    if path.name == BACKBONE and (path.parent / "checkpoint.json").is_file():
        path = path.parent  # the checkpoint tells the net and its threshold
    if path.is_dir():
        folder = find_checkpoint(path)
        config, weights = _net_config(folder), weights_file(folder)
        checkpoint, (verified, _) = folder, verification_of(folder)
    elif path.is_file():
        config, weights, checkpoint, verified = _bare_config(path, net), path, None, None
    else:
        raise UserError(f"{path}: no such run, checkpoint or weights file: give the path of one")
    refuse_other_net(path, net, config_name(config))
    module = build_net(config)
    load_weights(module, weights)
    on_device(module, device).eval().requires_grad_(False)
    return Recogniser(module, device, verified, config, checkpoint)


def read_weights(path: AnyPath) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; names of the published MobileFaceNet become the names used here.

    Raises:
        UserError: The file is unreadable or not in the safetensors format.
    """
    try:
        with local_copy(path) as file:
            state = load_file(file)
        return from_mxnet(state) if "conv_1_conv2d_weight" in state else state
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not readable as safetensors weights: {error}{_conversion(path)}") from None


def _conversion(path: AnyPath) -> str:
    """Return how to convert a file of PyTorch tensors, with the command to copy; nothing for other files."""
    if not path.name.endswith((".pth", ".pt")):
        return ""
    source, target = str(path), f"{str(path).rpartition('.')[0]}.safetensors"
    loaded = f"torch.load({source!r}, weights_only=True)"
    script = f"import torch, safetensors.torch as s; s.save_file({loaded}, {target!r})"
    return f": convert it once: python -c {shlex.quote(script)}"


def load_weights(module: nn.Module, path: AnyPath) -> None:
    """Load the weights of a file into a net. A mixture of experts also takes the weights of its plain net.

    Raises:
        UserError: The weights belong to another net.
    """
    state = read_weights(path)
    if isinstance(module, IResNet) and isinstance(module.layer4, Mixture):
        state = module.layer4.from_plain(state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        actual, wanted = weights_name(state), weights_name(module.state_dict())
        if actual and wanted and actual != wanted:
            mend = "change net.kind and net.depth, or give other weights"
            raise UserError(f"{path} holds {article(actual)}, not {article(wanted)}: {mend}") from None
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: weights do not fit the net: {shorten(first, 160, placeholder=' …')}") from None


def open_float(config: IResNetNet | MobileFaceNetNet, ref: str) -> IResNet | MobileFaceNet:
    """Build the float net of a section, with the weights of a run, a checkpoint or a file.

    Raises:
        UserError: The weights do not exist, or belong to another net.
    """
    net = build_float_net(config)
    load_weights(net, weights_file(ref))
    return net


def _net_config(checkpoint: AnyPath) -> Net:
    """Read the section ``net`` of a checkpoint."""
    try:
        tree = json.loads((checkpoint / "checkpoint.json").read_text())
        return TypeAdapter(Net).validate_python(tree["config"]["net"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{checkpoint}: damaged checkpoint.json ({type(error).__name__}): give an older checkpoint of the run"
        ) from None


def _bare_config(path: AnyPath, net: str | None) -> Net:
    """Return the section of a weights file: its metadata, or what ``net`` and the shapes of its tensors tell."""
    with local_copy(path) as local:
        state = read_weights(local)
        with safe_open(local, "pt") as file:
            section = (file.metadata() or {}).get("net")
    try:
        if section:
            return TypeAdapter(Net).validate_json(section)
        return _config_by_shapes(_bare_name(path, state, net), state)
    except (KeyError, IndexError, ValueError, ValidationError):
        raise UserError(
            f"{path}: its metadata or shapes are not those of {article(net or 'net')}: give another file"
        ) from None


def _bare_name(path: AnyPath, state: dict[str, Tensor], net: str | None) -> str:
    """Return the name of the net that bare weights belong to, if ``--net`` says the same.

    Raises:
        UserError: The user gave no name or another one, or no net here has such tensors.
    """
    actual = weights_name(state)
    mend = "open its run or checkpoint instead, which says more of the net"
    if actual is None:
        mend = f"give weights of one of {', '.join(NAMES)}"
    elif actual in NAMES:
        mend = f"give --net {actual}"
    content = article(actual or "net that bigface does not know")
    if net is None:
        raise UserError(f"{path}: bare weights need --net; the file holds {content}: {mend}")
    name = parse_name(net)
    if name != actual:
        raise UserError(f"{path} holds {content}, not {article(name)}: {mend}")
    return name


def _config_by_shapes(name: str, state: dict[str, Tensor]) -> Net:
    """Return the section of a named net with the widths, the input size and the embedding of its weights."""

    def channels(layer: str) -> int:
        return state[f"{layer}.weight"].shape[0]

    if name == "mobilefacenet":
        sizes = {"input_size": 16 * state["pool.conv.weight"].shape[2], "embedding": channels("fc")}
        return MobileFaceNetNet.model_validate(sizes | {"widths": [channels(layer) for layer in LAYERS]})
    widths = [channels(f"layer{stage}.0.conv1") for stage in (1, 2, 3, 4)]
    side = round((state["fc.weight"].shape[1] / widths[-1]) ** 0.5)
    sizes = {"input_size": 16 * side, "embedding": channels("fc")}
    depth = int(name.removeprefix("iresnet"))
    return IResNetNet.model_validate(sizes | {"depth": depth, "widths": widths})
