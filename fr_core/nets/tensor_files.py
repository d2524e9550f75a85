"""Reads the tensors of any file of weights: safetensors, or what ``torch.save`` writes. Nothing in a file ever runs.

PyTorch's files are pickles. They are read with ``weights_only=True``, which makes tensors and plain containers alone.
Trainers add objects of their own, such as Lightning's callbacks. For these classes an empty stand-in is made; their
real code is neither imported nor called. A file that names anything else is refused.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fr_core.data.stand_ins import stand_in
from fr_core.data.store import AnyPath, local_copy
from fr_core.errors import UserError

# Modules whose objects lie beside weights in checkpoints of the field, as settings and figures.
BOOKKEEPING = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|torchmetrics|omegaconf|easydict|yacs|ml_collections|mmengine|mmcv"
    r"|argparse|pathlib|numpy|_codecs|collections)\."
)
# What the first bytes of a file may be that is no weights of PyTorch: where they stand, and the mend.
OTHERS = {
    b"\x89HDF": (0, "an HDF5 file, as Keras writes it: convert the net to ONNX"),
    b"\x12\x01\x00\x00": (0, "parameters of MXNet: convert the net to ONNX"),
    b"TFL3": (4, "a net of TensorFlow Lite: convert it to ONNX"),
    b"\x1f\x8b": (0, "compressed by gzip: decompress it first"),
}
PICKLE, ZIP = b"\x80", b"PK\x03\x04"
DAMAGED = "cut off or damaged: copy the file again"


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file under the names that lead to them, such as ``state_dict.model.fc.weight``."""

    tensors: dict[str, Tensor]
    net: str | None = None  # section ``net`` as JSON, in files of bigface


class _StandIn:
    """An object without content, in place of one that only a trainer could make."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_tensor_file(path: AnyPath) -> TensorFile:
    """Read all tensors of a file, in whatever dictionaries they lie.

    Raises:
        UserError: The file is unreadable, of another format, or would have to run code.
    """
    try:
        with local_copy(path) as file:
            with file.open("rb") as stream:
                start = stream.read(64)
            if start.startswith((ZIP, PICKLE)):
                tensors = dict(_flat(_unpickled(path, file, start.startswith(ZIP))))
                _refuse_no_arrays(path, tensors)
                return TensorFile(tensors)
            _refuse_others(path, start)
            with safe_open(file, "pt") as header:
                net = (header.metadata() or {}).get("net")
            return TensorFile(load_file(file), net)
    except (OSError, SafetensorError) as error:
        mend = f"; {DAMAGED}" if isinstance(error, SafetensorError) else ""
        raise UserError(f"{path}: not readable as safetensors weights: {error}{mend}") from None


def _refuse_others(path: AnyPath, start: bytes) -> None:
    """Refuse a file that is neither safetensors nor a zip or a pickle, by its first bytes.

    Raises:
        UserError: The file is one; the message says what it is, if that is known.
    """
    if not start:
        raise UserError(f"{path}: the file is empty: copy it again")
    what = stand_in(start) or next((what for key, (at, what) in OTHERS.items() if start[at:].startswith(key)), None)
    if what:
        raise UserError(f"{path}: {what}")
    if not path.name.endswith(".safetensors") and start[8:9] != b"{":
        raise UserError(f"{path}: no file of weights: give safetensors, ONNX or what torch.save writes")


def _unpickled(path: AnyPath, file: Path, zipped: bool) -> object:
    """Return what ``torch.save`` wrote, with stand-ins for the objects of trainers.

    Raises:
        UserError: The file is damaged, or would have to run code.
    """
    if zipped:
        _refuse_other_zips(path, file)
    try:
        with warnings.catch_warnings(action="ignore"):
            unknown = get_unsafe_globals_in_checkpoint(file) if zipped else []
            strange = sorted(name for name in unknown if not BOOKKEEPING.match(name))
            if strange:
                mend = "save the net's state_dict() instead"
                raise UserError(f"{path}: refused: it holds a program object, {strange[0]}, not tensors alone: {mend}")
            with safe_globals([(_stand_in(name), name) for name in unknown]):
                return torch.load(file, "cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        named = f"a program object, {what[1]}, not tensors alone" if what else "more than tensors"
        raise UserError(f"{path}: refused: it holds {named}: save the net's state_dict() instead") from None
    except Exception as error:  # damaged archives and pickles raise errors without a common base class
        if "torchscript" in str(error).lower():
            raise UserError(f"{path}: refused: a TorchScript program: save the net's state_dict() instead") from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not readable as PyTorch weights: {reason}; {DAMAGED}") from None


def _refuse_other_zips(path: AnyPath, file: Path) -> None:
    """Refuse a zip that is cut off, or that ``torch.save`` did not write.

    Raises:
        UserError: The file is one.
    """
    if not zipfile.is_zipfile(file):
        raise UserError(f"{path}: not readable as PyTorch weights: {DAMAGED}")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error):
        raise UserError(f"{path}: not readable as PyTorch weights: {DAMAGED}") from None
    if not any(name.endswith("/data.pkl") for name in names):
        held = f", which holds {names[0]}" if names else ""
        raise UserError(f"{path}: a zip that torch.save did not write{held}: unpack it, and give the weights in it")


def _stand_in(name: str) -> type:
    """Return a class that takes the place of a trainer's class; dictionaries keep their content."""
    return OrderedDict if name.endswith("Dict") else type(name.rpartition(".")[2], (_StandIn,), {})


def _refuse_no_arrays(path: AnyPath, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no plain arrays of numbers.

    Raises:
        UserError: A tensor is one without values, a sparse or a quantised one, or one of complex numbers.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            what = "has no values" if tensor.is_meta else "is sparse, quantised or complex"
            raise UserError(f"{path}: its tensor {name} {what}: save the float net's state_dict() instead")


def _flat(content: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries and lists with dotted names."""
    if isinstance(content, Tensor):
        yield name, content.detach()
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _flat(value, f"{name}.{key}" if name else str(key))
