"""The processor of this process: its device, its native arithmetic, and PyTorch's threads and memory."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # constants of glibc's malloc.h


def default_device() -> torch.device:
    """Return this process's GPU if it has one, else the CPU. Ray and torchrun show each worker its GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively. Other CPUs emulate it, ten times slower than float32.

    A CPU that ``ATEN_CPU_CAPABILITY`` limits below AVX-512 counts as one without bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def reached(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that a card reaches when it has done all that it was asked so far; None elsewhere."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def set_arithmetic(deterministic: bool, tf32: bool) -> None:
    """Set how cards compute in this process.

    Args:
        deterministic: The same numbers in every run; else the fastest algorithms, which cuDNN finds by trying them.
        tf32: Convolutions of float32 numbers may use TensorFloat-32.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute without TensorFloat-32 and without compiled code, as embeddings need from which thresholds are taken."""
    cudnn = torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with cudnn.flags(**kept, allow_tf32=False), torch.compiler.set_stance("force_eager"):
        yield


def from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. A card gets it from pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def integers_from_host(parts: Sequence[Tensor | Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Copy vectors of whole numbers of the host to a device, in one copy: int64 each."""
    vectors = [torch.as_tensor(part, dtype=torch.int64) for part in parts]
    return from_host(torch.cat(vectors), device).split([len(vector) for vector in vectors])


def use_processor(threads: int) -> None:
    """Set PyTorch's threads in this process and keep freed memory for the next step.

    Ray's workers start with one thread. By default glibc returns large blocks to the kernel, and so do the small heaps
    of threads. The kernel then faults every page in again, which costs a third of a step's time on CPUs.

    Args:
        threads: threads of PyTorch; at least one is set.
    """
    torch.set_num_threads(max(1, threads))
    if sys.platform == "linux" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
                libc.mallopt(option, value)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on this process's GPU, or the peak bytes of the process if it has no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage would inherit the peak of the parent process
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
