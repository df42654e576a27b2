"""Backend `triton` of the short convolution, for NVIDIA GPUs: taps, activation and norm in one pass over memory.

    kernels   forward, backward and the decode step
    op        the launches, as a torch custom op

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["refuses", "short_conv", "step_"]

short_conv: Callable[..., Any]
step_: Callable[..., Any]
if INSTALLED:
    from glade.ops.short_conv.triton.op import short_conv, step_
else:

    def _never(*_: Any) -> Any:
        raise AssertionError("`refuses` lets no call through to here")

    short_conv = step_ = _never
