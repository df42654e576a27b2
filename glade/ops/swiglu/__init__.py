"""SwiGLU's product: the two halves of a joint projection become one.

    y = silu(gate) * up         [gate | up] = x, halves of the last axis

Source: arXiv:2002.05202.
"""

from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.native import rows
from glade.ops.swiglu import cpu, eager, reference, triton

__all__ = ["BACKENDS", "swiglu"]

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.swiglu, triton.refuses),
    "cpu": Backend(cpu.swiglu, rows.refuses),
    "torch": Backend(eager.swiglu),
    "reference": Backend(reference.swiglu, automatic=False),
}


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """y = silu(gate) * up, computed in fp32 (fp64 for fp64 inputs).

    Args:
        x:       [..., 2 F], the gate's channels and then the factor's
        backend: "reference", "torch", "cpu" (fp32 and bf16 on the CPU), "triton" (on NVIDIA GPUs), or
                 "auto": the fastest installed

    Returns:
        y [..., F] in x's dtype.

    Raises:
        ValueError: x has an odd number of channels, or is not floating-point. BackendError: `backend` cannot serve x.
    """
    if x.dim() < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; give floating-point [..., 2 F]")
    return BACKENDS[choose("swiglu", BACKENDS, backend, x.device, x.dtype)].run(x)
