"""The sigmoid of a gate that is a slice of a wider projection.

    y = 1 / (1 + exp(-x))

An op of its own for the gradient, which is written beside those of the other slices (`glade.ops.parts`); torch's would
be copied there, and torch takes its time with slices, whose rows do not lie end to end.
"""

import torch
from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.sigmoid import reference, triton

__all__ = ["BACKENDS", "sigmoid"]

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.sigmoid, triton.refuses),
    "torch": Backend(torch.sigmoid),
    "reference": Backend(reference.sigmoid, automatic=False),
}


def sigmoid(x: Tensor, *, backend: str = "auto") -> Tensor:
    """y, contiguous, in x's dtype; computed in fp32 (fp64 for fp64 inputs).

    Args:
        x:       [..., C]
        backend: "reference", "torch", "triton" (on NVIDIA GPUs), or "auto": the fastest installed

    Raises:
        ValueError: x is not floating-point, or a scalar. BackendError: `backend` cannot serve x.
    """
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; give floating-point [..., C]")
    return BACKENDS[choose("sigmoid", BACKENDS, backend, x.device, x.dtype)].run(x)
