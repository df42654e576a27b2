"""How far a backend may stand from the fp64 reference: the one table, read by the tests and by `glade doctor`.

An error is max |x - reference| / max |reference| over a tensor; the reference is computed in fp64 from the very inputs
(already rounded to their dtype) that the backend was given. The gradient of a log decay is a small difference of large
terms, so its error is relative to the largest of those terms, |q dq|, |k dk| and |erase d_erase|, never to |dg|.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    value: float  # outputs and states
    gradient: float


# fp32: a few hundred roundings of 6e-8. bf16 and fp16: inputs are exact, so what is left is the rounding of outputs
# and gradients (2^-9, 2^-12) and of what a kernel keeps in that dtype between its products.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-11),
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.float16: Tolerance(2e-3, 4e-3),
    torch.bfloat16: Tolerance(1e-2, 1e-2),
}


def relative_error(x: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """max |x - reference| over `scale` (max |reference| if None); infinite if x is not finite."""
    if x.shape != reference.shape:
        raise ValueError(f"compared shapes differ: {list(x.shape)} and {list(reference.shape)}")
    if x.numel() == 0:
        return 0.0
    if not x.isfinite().all():
        return float("inf")
    difference = (x.double() - reference.double()).abs().max().item()
    scale = reference.double().abs().max().item() if scale is None else scale
    return difference / scale if scale > 0 else difference
