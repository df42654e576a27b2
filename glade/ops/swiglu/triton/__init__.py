"""Backend `triton` of SwiGLU's product, for NVIDIA GPUs: one pass over memory forward and one backward.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.backends import never
from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["refuses", "swiglu"]

swiglu: Callable[..., Any] = never
if INSTALLED:
    from glade.ops.swiglu.triton.op import swiglu
