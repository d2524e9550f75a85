"""The processor of this process: which one, what it multiplies natively, and how PyTorch uses it."""

import ctypes
import resource
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def default_device() -> torch.device:
    """This process's GPU (Ray and torchrun show each worker its own), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are native there. CPUs without them emulate, ten times slower than float32.

    A CPU that ``ATEN_CPU_CAPABILITY`` holds below AVX-512 counts as one without.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def use_processor(threads: int) -> None:
    """PyTorch's threads in this process (Ray's workers start with one), and memory that is kept between steps.

    glibc returns large blocks to the kernel, at once or from the small heaps that it gives to threads, and faults every
    page in again: on CPUs a third of a step's time.
    """
    torch.set_num_threads(max(1, threads))
    if sys.platform == "linux" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
                libc.mallopt(option, value)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors held at most on this process's card, or without one the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage would begin with the peak of the process that started this one
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
