"""Backend `triton` of the cross-entropy of a linear layer, for NVIDIA GPUs.

The products are cuBLAS's, a chunk of tokens at a time; a kernel each makes the losses of a chunk's logits, and their
gradient in place. Triton comes with torch's CUDA builds, and is imported with those only.
"""

from collections.abc import Callable
from typing import Any

from glade.ops.linear_attention.triton import INSTALLED, refuses

__all__ = ["linear_cross_entropy", "refuses"]

linear_cross_entropy: Callable[..., Any]
if INSTALLED:
    from glade.ops.cross_entropy.triton.linear import linear_cross_entropy
else:

    def linear_cross_entropy(*_: Any) -> Any:
        raise AssertionError("`refuses` lets no call through to here")
