"""Backend `triton` of the log decays, for NVIDIA GPUs: one pass over memory forward and one backward.

Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.backends import never
from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["log_decay", "refuses"]

log_decay: Callable[..., Any] = never
if INSTALLED:
    from glade.ops.log_decay.triton.op import log_decay
