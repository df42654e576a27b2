"""Backend `triton` of the sigmoid, for NVIDIA GPUs: one pass over memory forward and one backward.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.backends import never
from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["refuses", "sigmoid"]

sigmoid: Callable[..., Any] = never
if INSTALLED:
    from glade.ops.sigmoid.triton.op import sigmoid
