"""Backend `triton` of rotary positions, for NVIDIA GPUs: one pass over memory forward and one backward.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.backends import never
from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["refuses", "rope"]

rope: Callable[..., Any] = never
if INSTALLED:
    from glade.ops.rope.triton.op import rope
