"""Opens any backbone: a run, a checkpoint, a file of weights of bigface or of another project, or an ONNX file.

No head is needed. Legend: N images, B batch, C channels, H W pixels, D embedding.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fr_core.config.mends import as_toml
from fr_core.config.nets import IResNetNet, MobileFaceNetNet, Net
from fr_core.data.decode import resized
from fr_core.data.store import AnyPath, local_copy, to_path
from fr_core.device import default_device, from_host, full_float32, reached
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.build import build_float_net, build_net, on_device
from fr_core.nets.checkpoint_files import BACKBONE, find_checkpoint, weights_file
from fr_core.nets.families import FAMILIES, State
from fr_core.nets.iresnet import IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.moe import Mixture
from fr_core.nets.names import article, config_name, parse_name, refuse_other_net, weights_name
from fr_core.nets.onnx_net import OnnxNet, open_onnx
from fr_core.nets.sections import section_of
from fr_core.nets.verifications import Verified, verification_of
from fr_core.nets.weights import Weights, read_weights


@dataclass
class Recogniser:
    """A backbone in eval mode, ready to embed images."""

    net: Backbone | OnnxNet
    device: torch.device
    verified: Verified | None = None  # newest verification, if any
    config: Net | None = None  # what the net is; an ONNX file does not say
    checkpoint: AnyPath | None = None  # the folder that it was opened from, if that is a checkpoint
    taken_for: str | None = None  # whose net a file of another program was taken for, and what pixels that takes

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
        """Return the embeddings of aligned face crops, computed in full float32.

        Args:
            images_NHWC: uint8 [N, H, W, 3], RGB, of any size; they are resized to the net's input.
            flip: Add the embedding of the mirrored image, as verification protocols do.
            batch: Images in one forward pass.
            progress: Function that is called with the number of images after each batch.
            normalise: Scale embeddings to length 1. Template protocols need the original lengths.

        Returns:
            float32 [N, D]. NaN where a net of broken weights gives no direction: only zeros, or an endless length.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        images_NHWC = np.asarray(images_NHWC)
        if images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3 or images_NHWC.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, 3], not {images_NHWC.dtype} {images_NHWC.shape}")
        embeddings = np.empty((len(images_NHWC), self.net.embedding), np.float32)
        running: tuple[slice, torch.Tensor, torch.cuda.Event | None] | None = None  # a card works one batch behind

        def store() -> None:
            if running:
                rows, out_BD, done = running
                if done:
                    done.synchronize()
                embeddings[rows] = out_BD.numpy()
                if progress:
                    progress(len(out_BD))

        with full_float32():
            for start in range(0, len(images_NHWC), batch):
                rows = slice(start, start + batch)
                chunk = np.stack([resized(image, self.net.input_size) for image in images_NHWC[rows]])
                x_BCHW = normalised(from_host(torch.from_numpy(chunk), self.device), self.net)
                out_BD = self.net(x_BCHW)
                if flip:
                    out_BD = out_BD + self.net(x_BCHW.flip(3))
                out_BD = directions(out_BD) if normalise else out_BD
                out_BD = out_BD.to("cpu", non_blocking=True)
                store()
                running = rows, out_BD, reached(self.device)
            store()
        return embeddings


def directions(embeddings_BD: torch.Tensor) -> torch.Tensor:
    """Return embeddings scaled to length 1; NaN where the length is 0 or not finite."""
    lengths_B1 = embeddings_BD.norm(dim=1, keepdim=True)
    usable_B1 = (lengths_B1 > 0) & lengths_B1.isfinite()
    return torch.where(usable_B1, embeddings_BD / lengths_B1, torch.nan)


def open_net(
    ref: str | AnyPath,
    net: str | None = None,
    device: torch.device | None = None,
    changeable: bool = False,
    trust_code: bool = False,
) -> Recogniser:
    """Open a backbone.

    Args:
        ref: Folder of a run or of a checkpoint, or a file of weights: ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt``.
            Or an ``.onnx`` file, which runs on the CPU. Local path or URL. docs/weights.md lists whose files open.
        net: What the file holds, where it does not tell: a family such as ``adaface``. Or the name of the net, which
            must then agree: ``mobilefacenet`` or ``iresnetDEPTH``, such as ``iresnet50``.
        device: Device of the net; None: :func:`fr_core.device.default_device`.
        changeable: Turn an ONNX file of another program back into a net of PyTorch, to be trained or changed.
        trust_code: Run the code that ``ref`` names, if its net is of people's own code (``net.kind = factory``).

    Raises:
        UserError: Nothing is there, files are damaged, or weights belong to no net here or are not finite. Or ``net``
            is missing or wrong, or the net is of code that is not trusted.
    """
    device = device or default_device()
    path = to_path(ref)
    if path.is_file() and path.name.endswith(".onnx") and not changeable:
        return _open_onnx(path, net)
    checkpoint, verified, taken_for = None, None, None
    if folder := _checkpoint_of(path):
        checkpoint, (verified, _) = folder, verification_of(folder)
    weights = find_weights(path, net, trust_code)
    if weights.family:
        taken_for = f"{weights.family.title}: {weights.family.input}"
    module = build_net(weights.net)
    module.load_state_dict(weights.state)
    on_device(module, device).eval().requires_grad_(False)
    return Recogniser(module, device, verified, weights.net, checkpoint, taken_for)


def find_weights(ref: str | AnyPath, net: str | None = None, trust_code: bool = False) -> Weights:
    """Read the net of a run, of a checkpoint or of a file, as :func:`open_net` takes them.

    Raises:
        UserError: As :func:`open_net`.
    """
    path = to_path(ref)
    if folder := _checkpoint_of(path):
        section = _net_config(folder)
        refuse_other_net(path, net, config_name(section))
        return read_weights(weights_file(folder), None, section, trust_code)
    if not path.is_file():
        raise UserError(f"{path}: no such run, checkpoint or weights file: give the path of one")
    return read_weights(path, net, None, trust_code)


def load_weights(module: nn.Module, ref: str | AnyPath, net: str | None = None, trust_code: bool = False) -> Weights:
    """Load the weights of a run, a checkpoint or a file into a net, and return them as they were read.

    A mixture of experts also takes the weights of its plain net.

    Raises:
        UserError: As :func:`open_net`, or the weights belong to another net.
    """
    weights = find_weights(ref, net, trust_code)
    state = weights.state
    if isinstance(module, IResNet) and isinstance(module.layer4, Mixture):
        state = module.layer4.from_plain(state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        actual, wanted = weights_name(state), weights_name(module.state_dict())
        if actual and wanted and actual != wanted:
            mend = "change net.kind and net.depth, or give other weights"
            raise UserError(f"{ref} holds {article(actual)}, not {article(wanted)}: {mend}") from None
        first = shorten(str(error).splitlines()[1].strip(), 160, placeholder=" …")
        raise UserError(f"{ref}: weights do not fit the net: {_difference(module, state) or first}") from None
    return weights


def _difference(module: nn.Module, state: State) -> str | None:
    """Return the overrides that make a net fit some weights; None if that is not as simple."""
    try:
        wanted, found = section_of(module.state_dict()).model_dump(), section_of(state).model_dump()
    except UserError:
        return None
    other = {name: value for name, value in found.items() if wanted.get(name) != value}
    return f"give {' '.join(f'net.{name}={as_toml(value)}' for name, value in other.items())}" if other else None


def open_float(config: IResNetNet | MobileFaceNetNet, ref: str, net: str | None = None) -> IResNet | MobileFaceNet:
    """Build the float net of a section, with the weights of a run, a checkpoint or a file.

    Raises:
        UserError: The weights do not exist, or belong to another net.
    """
    module = build_float_net(config)
    load_weights(module, ref, net)
    return module


def _open_onnx(path: AnyPath, net: str | None) -> Recogniser:
    """Open an ONNX file for inference."""
    name = net and parse_name(net)
    with local_copy(path) as local:
        opened = open_onnx(local, name if name in FAMILIES else None)
    if name not in FAMILIES:
        refuse_other_net(path, name, opened.name)
    return Recogniser(opened, torch.device("cpu"), opened.verified, taken_for=opened.taken_for)


def _checkpoint_of(path: AnyPath) -> AnyPath | None:
    """Return the checkpoint that a path names: a run's newest, or the one whose weights the file is. None: a bare file.

    Raises:
        UserError: The folder is no checkpoint and no run that has one.
    """
    if path.is_dir():
        return find_checkpoint(path)
    named = path.name == BACKBONE and (path.parent / "checkpoint.json").is_file()
    return path.parent if named else None


def _net_config(checkpoint: AnyPath) -> Net:
    """Read the section ``net`` of a checkpoint."""
    try:
        tree = json.loads((checkpoint / "checkpoint.json").read_text())
        return TypeAdapter(Net).validate_python(tree["config"]["net"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{checkpoint}: damaged checkpoint.json ({type(error).__name__}): give an older checkpoint of the run"
        ) from None
