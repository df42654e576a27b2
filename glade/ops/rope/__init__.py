"""Rotary positions: each pair of channels is turned by an angle proportional to the token's position.

    (x_i, x_{i+d/2}) -> rotation by position * theta^(-2i/d) of that pair,    i = 0 .. d/2 - 1

The pairs are halves apart ("half-split", as in Llama and GPT-NeoX), not neighbours. A dot product of a turned query and
a turned key depends on the distance of their positions alone.

Source: Su et al., RoFormer, arXiv:2104.09864, section 3.2.
"""

import torch
from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.rope import eager, triton

__all__ = ["BACKENDS", "rope"]

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.rope, triton.refuses),
    "torch": Backend(eager.rope),
}


def rope(
    x: Tensor, positions: Tensor, *, theta: float = 10000.0, dims: int | None = None, backend: str = "auto"
) -> Tensor:
    """Turns the first `dims` channels of every head and leaves the others as they are.

    Args:
        x:         [B, T, H, K]
        positions: [T] or [B, T] int64, the first token of a document at 0
        theta:     base of the wave lengths, which run from 2 pi to about 2 pi theta tokens
        dims:      how many channels are turned, even; None is all K
        backend:   "torch", "triton" (on NVIDIA GPUs), or "auto": the fastest installed

    Returns:
        [B, T, H, K] in x's dtype; angles and products are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape or dtype that does not fit, or `dims` that is odd or more than K. BackendError: `backend`
        cannot serve x.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; give floating-point [B, T, H, K]")
    B, T, _, K = x.shape
    if positions.dtype != torch.int64 or positions.shape not in ((T,), (B, T)):
        raise ValueError(
            f"positions is {positions.dtype} of shape {list(positions.shape)}; give int64 [{T}] or [{B}, {T}]"
        )
    dims = K if dims is None else dims
    if dims % 2 or not 0 <= dims <= K:
        raise ValueError(f"dims is {dims}; give an even number from 0 to the {K} channels of a head")
    if theta <= 0:
        raise ValueError(f"theta is {theta}; give a positive number")
    return BACKENDS[choose("rope", BACKENDS, backend, x.device, x.dtype)].run(x, positions, theta, dims)
