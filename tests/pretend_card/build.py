"""Compiles the C++ half of the pretend card against the installed PyTorch."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


class NotBuilt(Exception):
    """This machine has no use for the pretend card, or cannot compile it; the message says why."""


def build_guard(folder: Path) -> Path:
    """Compile ``guard.cpp`` into a folder and return the library.

    Raises:
        NotBuilt: there is no C++ compiler, it refuses the file, or PyTorch has CUDA of its own.
    """
    found = find_spec("torch")  # not imported: the library must be loaded before PyTorch
    assert found is not None
    assert found.origin is not None
    torch, library = Path(found.origin).parent, folder / "guard.so"
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotBuilt("this PyTorch has CUDA of its own: install its build for CPUs")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NotBuilt("no C++ compiler: install g++")
    words = [*compiler.split(), "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}", str(SOURCE)]
    words += ["-o", str(library), f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{compiler}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise NotBuilt(f"{compiler} refuses guard.cpp: {first}")
    return library
