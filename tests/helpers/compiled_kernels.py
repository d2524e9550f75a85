"""Compiles the kernels for a card that is not here, and counts what a tile asks of it.

``python -m tests.helpers.compiled_kernels 90 bfloat16`` prints JSON. For each compiled kernel it has the registers, the
bytes of stack a thread, and whether tensor cores multiply. For a tile of each head it has the rows, the launches, and
the bytes of memory traffic a logit. A launch is said to read or write each of its tensors once: the cache holds the
operands.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fr_core.heads import kernels
from fr_core.heads.streamed import TileSGD, kernel_tile_size

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TENSOR_CORES = re.compile(rb"\b(HGMMA|HMMA|UTCHMMA)\b")
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that a block may have, by card
ALLOCATES = {"aten::empty", "aten::new_empty", "aten::t", "aten::transpose", "aten::permute"}
SCALE, EMBEDDING = 64.0, 512


class NoCard:
    """A driver of Triton that compiles for a card and launches nothing."""

    def __init__(self, arch):
        self.arch, self.utils, self.launcher_cls = arch, self, NoLauncher
        self.compiled = []

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, name, kernel, shared, device):
        """Instead of loading a kernel, see how it was compiled."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel)
            file.flush()
            usage = disassembled("--dump-resource-usage", file.name)
            tensor_cores = TENSOR_CORES.search(disassembled("--dump-sass", file.name)) is not None
        registers, stack = map(int, re.search(rb"REG:(\d+) STACK:(\d+)", usage).groups())
        self.compiled.append({"name": name, "registers": registers, "stack": stack, "tensor_cores": tensor_cores})
        return None, None, registers, stack, 1024


def disassembled(*arguments):
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, check=True).stdout


class NoLauncher:
    """What Triton calls to launch a kernel."""

    counts: "Counts | None" = None

    def __init__(self, source: Any, metadata: Any):
        self.names = source.fn.arg_names

    def __call__(self, *args: Any):
        if self.counts:
            self.counts.launch(dict(zip(self.names, args[-len(self.names) :], strict=True)))


class Counts(TorchDispatchMode):
    """The launches of a tile, and their bytes."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __enter__(self):
        NoLauncher.counts = self
        return super().__enter__()

    def __exit__(self, *error):
        NoLauncher.counts = None
        return super().__exit__(*error)

    def launch(self, arguments):
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        moves = "momentum_ND" in tensors
        in_place = {"weight_ND", "momentum_ND"} if moves else {"out_MD"} if arguments.get("KEEP") else set()
        self.launches += 1
        self.bytes += sum(x.nbytes * (1 + (name in in_place)) for name, x in tensors.items())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().partition(".")[0] in ALLOCATES, f"{func} inside a tile is a launch of PyTorch's: count it"
        return func(*args, **(kwargs or {}))

    def per_tile(self, faces, rows):
        return {"rows": rows, "launches": self.launches, "bytes": self.bytes / (faces * rows)}


def class_matrix_tile(precision, faces=4096):
    """Both passes of the margin softmax, with the filter and the fused SGD."""
    rows = kernel_tile_size(faces, EMBEDDING)
    unit_GD, weight_ND = torch.empty(faces, EMBEDDING), torch.empty(rows, EMBEDDING)
    operand_GD, sum_GD = torch.empty(faces, EMBEDDING, dtype=precision), torch.empty(faces, EMBEDDING)
    column_G, total_G, each = torch.zeros(faces, dtype=torch.int64), torch.empty(faces), torch.tensor(1.0)
    positives = kernels.sort_positives(unit_GD, total_G, column_G, rows)
    sgd, finite = TileSGD(torch.empty(rows, EMBEDDING), 0.1, 0.9, 5e-4), torch.tensor(True)
    with Counts() as counts:
        centres_TD = kernels.unit_rows(weight_ND, None, 0, rows, precision)
        kernels.log_sum_exp(operand_GD, centres_TD, column_G, SCALE)
        centres_TD = kernels.unit_rows(weight_ND, None, 0, rows, precision)
        found = kernels.exponentials(operand_GD, centres_TD, column_G, total_G, SCALE, eps=1e-9)
        alive = kernels.list_alive(found.alive_FC)
        kernels.add_products_of_faces(sum_GD, found, centres_TD, alive)
        product_TD = torch.empty(rows, EMBEDDING)
        kernels.products_of_rows(found, operand_GD, alive, product_TD)
        kernels.move_rows(product_TD, weight_ND, None, 0, positives, each, precision, sgd, finite)
    kernels.gradient_of_rows(product_TD, weight_ND, torch.arange(rows), 0, positives, each, precision)
    return counts.per_tile(faces, rows)


def fixed_centres_tile(precision, faces=512):
    """The one pass over fixed centres; the product of the exponentials with them is PyTorch's."""
    rows = kernel_tile_size(faces, EMBEDDING)
    operand_GD, centres_TD = (torch.empty(n, EMBEDDING, dtype=precision) for n in (faces, rows))
    labels_G, labels_T = (torch.zeros(n, dtype=torch.int64) for n in (faces, rows))
    reference_G, pull_GD = torch.empty(faces), torch.empty(faces, EMBEDDING)
    with Counts() as counts:
        found = kernels.exponentials(operand_GD, centres_TD, labels_G, reference_G, SCALE, labels_T=labels_T)
        counts.launch({"out_MD": pull_GD, "left_MK": found.values_GT, "right_KD": centres_TD, "KEEP": True})
    return counts.per_tile(faces, rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.compiled_kernels", description=__doc__)
    parser.add_argument("arch", type=int, choices=SHARED)
    parser.add_argument("precision", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args()
    torch.use_deterministic_algorithms(True)  # so that there is one way to compile each kernel
    torch.utils.deterministic.fill_uninitialized_memory = False
    card, precision = NoCard(given.arch), getattr(torch, given.precision)
    driver.set_active(card)
    tiles = {"class matrix": class_matrix_tile(precision), "fixed centres": fixed_centres_tile(precision)}
    print(json.dumps({"compiled": card.compiled, "tiles": tiles}, indent=1))


if __name__ == "__main__":
    main()
