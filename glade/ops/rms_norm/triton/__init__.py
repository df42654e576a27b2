"""Backend `triton` of the norm, for NVIDIA GPUs: one pass over memory forward and one backward.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.backends import never
from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["add_rms_norm", "refuses", "rms_norm", "takes_bias"]

rms_norm: Callable[..., Any] = never
add_rms_norm: Callable[..., Any] = never
takes_bias: Callable[..., bool] = never
if INSTALLED:
    from glade.ops.rms_norm.triton.op import add_rms_norm, rms_norm, takes_bias
