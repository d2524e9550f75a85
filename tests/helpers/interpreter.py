"""Triton's interpreter, mended for bfloat16: it multiplies its bits as integers, and cuts off where a card rounds.

See https://github.com/triton-lang/triton/issues/11584. Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend_interpreter():
    """Let this process's interpreter compute with bfloat16 as a card does."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(InterpreterBuilder, name, lambda self, source, target: self.cast_impl(source, target))


def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
