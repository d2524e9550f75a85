"""A backbone as an ONNX file, for any runtime; here ONNX Runtime opens it.

The file holds the folded net in float32, or a quantised net's integers (:mod:`fr_core.nets.qdq`). The input
``x_BCHW`` [B, 3, size, size] has normalised pixels. The output ``embeddings_BD`` [B, D] is not L2-normalised. B is
any number. The metadata (:class:`Facts`) says how to use the file. More than 1.5 GiB of weights go to a second file,
``FILE.onnx.data``, since protobuf ends at 2 GiB.

Files of other programs have other names, perhaps a fixed B, and no metadata: :mod:`fr_core.nets.onnx_foreign`.

Legend: B batch, C channels, H W pixels, D embedding.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fr_core.data.stand_ins import refuse_stand_ins
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone
from fr_core.nets.names import weights_name
from fr_core.nets.verifications import Verified

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import ModelProto, TensorProto
    from onnxruntime import InferenceSession

INPUT, OUTPUT = "x_BCHW", "embeddings_BD"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install 'bigface[export]'"
DOMAINS = ("", "ai.onnx", "com.microsoft")  # operators that ONNX Runtime itself has
WHOLE = 3 * 2**29  # most bytes of weights that the file itself holds
MEASURED = ("threshold", "accuracy", "accuracy_low", "accuracy_high", "pairs", "people")  # of the net's verification


class Facts(BaseModel):
    """Metadata of an ONNX file, which stores all values as strings."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input_size: int = Field(ge=1)  # pixels
    input_mean: float = 127.5  # older files do not say
    input_std: float = Field(gt=0)
    embedding: int = Field(ge=1)
    normalisation: Literal["(pixel - input_mean) / input_std", "(pixel - 127.5) / input_std"] = (
        "(pixel - input_mean) / input_std"
    )
    channels: Literal["RGB"] = "RGB"
    net: str | None = None  # name of the net; older files have none
    # Files of quantised nets have the bits of their codes, which are stored in bytes whatever their number of bits.
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    activation_bits: int | None = Field(default=None, ge=2, le=8)
    threshold: float | None = Field(None, ge=-1, le=1)  # least cosine of flip-summed embeddings that is a match
    # How good the net is at this threshold; older files do not say.
    accuracy: float | None = Field(None, ge=0, le=1)
    accuracy_low: float | None = Field(None, ge=0, le=1)
    accuracy_high: float | None = Field(None, ge=0, le=1)
    pairs: int | None = Field(None, ge=1)
    people: int | None = Field(None, ge=1)

    @property
    def verified(self) -> Verified | None:
        """Return the verification of the net, or None without a threshold."""
        return None if self.threshold is None else Verified(**self.model_dump(include=set(MEASURED)))


@dataclass(frozen=True)
class Ends:
    """How a session takes images and gives embeddings."""

    input: str = INPUT
    output: str = OUTPUT
    batch: int | None = None  # images of one call; None: any number
    bgr: bool = False
    taken_for: str | None = None  # whose net a file of another program was taken for, and what pixels that takes


class OnnxNet(Backbone):
    """A net in ONNX Runtime on the CPU. It has no PyTorch parameters and passes no gradient."""

    def __init__(self, session: "InferenceSession", facts: Facts, checksum: str, ends: Ends = Ends()) -> None:
        super().__init__()
        self.session, self.checksum, self.ends = session, checksum, ends
        self.name, self.verified, self.taken_for = facts.net, facts.verified, ends.taken_for
        self.input_size, self.embedding = facts.input_size, facts.embedding
        self.input_mean, self.input_std = facts.input_mean, facts.input_std

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised."""
        pixels_BCHW = x_BCHW.flip(1) if self.ends.bgr else x_BCHW
        images, each = pixels_BCHW.float().contiguous().numpy(force=True), self.ends.batch or len(x_BCHW)
        embeddings = np.empty((len(images), self.embedding), np.float32)
        for start in range(0, len(images), each or 1):
            part = images[start : start + each]
            missing = each - len(part)  # a session of a fixed batch computes images of zeros too
            whole = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else part
            (out,) = self.session.run([self.ends.output], {self.ends.input: whole})
            embeddings[start : start + each] = out.reshape(each, -1)[: len(part)]
        return torch.from_numpy(embeddings).to(x_BCHW.device)


def installed() -> bool:
    """Return whether the packages of ``bigface[export]`` are installed."""
    return all(find_spec(name) for name in PACKAGES)


def write_onnx(net: Backbone, path: Path, verified: Verified | None = None, plain: bool = False) -> None:
    """Write a net as ``path``, with ``path.data`` beside it if the weights are large.

    Args:
        net: Net on the CPU, as :func:`fr_core.nets.fold_bn.folded` returns it.
        path: ONNX file to write.
        verified: Newest verification of the net, if there is one: its threshold and how good the net is there.
        plain: Keep PyTorch's own export of a float net's PReLU. ``bench`` compares it with the faster form.

    Raises:
        UserError: Packages are not installed, or integer kernels do not run this quantised net.
        OSError: The path cannot be written.
    """
    if not installed():
        raise UserError(f"ONNX files need: {INSTALL}")
    if not net.in_integers:
        _write_float(net, path, _facts(net, weights_name(net.state_dict()), verified), plain)
    else:
        from fr_core.nets.qdq import Quantised, qdq_model

        assert isinstance(net, Quantised)
        bits = {"weight_bits": str(net.weights), "activation_bits": str(net.activations)}
        model = qdq_model(net, INPUT, OUTPUT)
        for key, value in (_facts(net, net.name, verified) | bits).items():
            model.metadata_props.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())


def _facts(net: Backbone, name: str | None, verified: Verified | None) -> dict[str, str]:
    """Return the metadata that every file has."""
    sizes = {name: getattr(net, name) for name in ("input_size", "input_mean", "input_std", "embedding")}
    measured = verified.model_dump(include=set(MEASURED)) if verified else {}
    facts = Facts.model_validate(sizes | {"net": name} | measured)
    return {key: str(value) for key, value in facts.model_dump(exclude_none=True).items()}


def _write_float(net: Backbone, path: Path, facts: dict[str, str], plain: bool) -> None:
    """Export a float net with PyTorch's exporter."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    x_BCHW = torch.zeros(2, 3, net.input_size, net.input_size)  # the exporter takes a batch of 1 for a constant
    with _quietly():
        program = torch.onnx.export(
            net,
            (x_BCHW,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("B")},),
            custom_translation_table={} if plain else {torch.ops.aten.prelu.default: _prelu},
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # it holds paths of this machine's source files
    program.model.metadata_props.update(facts)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    program.save(path, external_data=weights > WHOLE)


def _prelu(x_BCHW: Any, slope_C: Any) -> Any:
    """Return slope·x + (1 − slope)·max(x, 0), a PReLU.

    ONNX Runtime's own PRelu is slow. It fuses these operators with the convolutions around them.
    """
    from onnxscript import opset18

    op: Any = opset18
    slope_C11 = op.Unsqueeze(slope_C, op.Constant(value_ints=[1, 2]))
    one = op.Constant(value_float=1.0)
    return op.Add(op.Mul(op.Relu(x_BCHW), op.Sub(one, slope_C11)), op.Mul(x_BCHW, slope_C11))


def open_onnx(path: Path, family: str | None = None) -> OnnxNet:
    """Open an ONNX file, of :func:`write_onnx` or of another program. Only this file and ``path.data`` are ever read.

    Args:
        family: Whose net the file of another program holds (:data:`fr_core.nets.families.FAMILIES`), which tells what
            pixels it takes. None: the file must tell.

    Raises:
        UserError: The file is unreadable, damaged, of another kind or refers to other files or operators, or packages
            are not installed. Or the file of another program does not tell what pixels it takes.
    """
    model = read_model(path)
    files = [path, *_external_files(model, path)]
    if not written_here(model):
        from fr_core.nets.onnx_foreign import facts_and_ends

        session = _session(path)
        facts, foreign = facts_and_ends(path, model, session, family)
        return OnnxNet(session, facts, _checksum(files), foreign)
    try:
        facts = Facts.model_validate({entry.key: entry.value for entry in model.metadata_props})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"{path}: not written by bigface export: metadata {wrong['loc'][0]}: {wrong['msg']}") from None
    del model
    session = _session(path, exact=saturates(facts.weight_bits))
    size = facts.input_size
    wanted = [(INPUT, "tensor(float)", [None, 3, size, size]), (OUTPUT, "tensor(float)", [None, facts.embedding])]
    ends = [*session.get_inputs(), *session.get_outputs()]
    found = [(end.name, end.type, [side if isinstance(side, int) else None for side in end.shape]) for end in ends]
    if found != wanted:
        raise UserError(f"{path}: not written by bigface export: it maps {found}, not {wanted}")
    return OnnxNet(session, facts, _checksum(files))


def read_model(path: Path, with_data: bool = False) -> "ModelProto":
    """Read the graph of an ONNX file, which has operators of ONNX and ONNX Runtime alone and finite weights.

    Args:
        with_data: Read the weights in ``path.data`` too, if there are any.

    Raises:
        UserError: Packages are not installed, the file is unreadable, or its operators or weights are others.
    """
    if not installed():
        raise UserError(f"{path}: ONNX files need: {INSTALL}")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import load_external_data_for_model

    refuse_stand_ins([path])
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path}: the file is empty: copy it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UserError(f"{path}: not readable as ONNX: {error}; cut off, damaged or another format") from None
    if not model.graph.node:
        raise UserError(f"{path}: not readable as ONNX: it has no operators")
    own = {*DOMAINS, *(function.domain for function in model.functions)}
    if other := {node.domain for node in model.graph.node} - own:
        raise UserError(f"{path}: refused: it needs operators of {min(other)}, which are code of another program")
    if _external_files(model, path) and with_data:
        load_external_data_for_model(model, str(path.parent))
    for tensor in model.graph.initializer:
        here = tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL
        if here and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
            raise UserError(f"{path}: holds numbers that are not finite, in {tensor.name}: give another file")
    return model


def written_here(model: "ModelProto") -> bool:
    """Return whether :func:`write_onnx` wrote a file, as far as its metadata tell."""
    return any(entry.key in ("normalisation", "input_std") for entry in model.metadata_props)


def _session(path: Path, exact: bool = False) -> "InferenceSession":
    """Return a session of ONNX Runtime; ``exact`` keeps its kernels from clipping sums (:func:`saturates`)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # errors are raised as exceptions too
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no other base class
        raise UserError(f"{path}: not a model that ONNX Runtime opens: {_line(error)}") from None


def saturates(weight_bits: int | None) -> bool:
    """Return whether this machine's fastest kernels would clip sums of products, so that slower ones must run.

    x86 without VNNI adds two products of codes in 16 bits. Two products of 255 · 63 fit, two of 255 · 127 do not. On
    other processors ONNX Runtime ignores the option that depends on this.
    """
    return weight_bits == 8 and not torch.cpu._is_vnni_supported()


def _external_files(model: "ModelProto", path: Path) -> list[Path]:
    """Return the file beside the model that holds weights, if there is one.

    Raises:
        UserError: The file is missing, or the model refers to other files.
    """
    import onnx

    data = path.with_name(path.name + ".data")
    wanted = {
        entry.value
        for tensor in _tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if wanted - {data.name}:
        raise UserError(f"{path}: refused: it reads other files than {data.name}: {sorted(wanted - {data.name})}")
    if wanted and (data.is_symlink() or not data.is_file()):
        raise UserError(f"{path}: its weights are in {data.name}: put that file beside it on a local disk")
    return [data] if wanted else []


def _tensors(message: "Message") -> Iterator["TensorProto"]:
    """Yield every TensorProto in a protobuf message at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name == "TensorProto":
                yield child
            yield from _tensors(child)


def _checksum(files: list[Path]) -> str:
    """Return a checksum of the contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's warnings: it misses torchvision, which is not needed, and deprecates its own parts."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return str(error).strip().partition("\n")[0]
