"""The log decays of the recurrence, g <= 0, from a projection: the two functions that the published mixers use.

    softplus      g = -rate * softplus(z + bias)        GDN, KDA, GDN-2 (Mamba-2's): rate = exp(A_log), bias = dt_bias
    logsigmoid    g =  rate * logsigmoid(z + bias)      GLA: rate = 1 / n

Sources: arXiv:2405.21060, 2412.06464; arXiv:2312.06635, section 4.3.
"""

from typing import Literal

from torch import Tensor

from glade.ops.backends import Backend, choose
from glade.ops.log_decay import cpu, eager, reference, triton
from glade.ops.native import rows

__all__ = ["BACKENDS", "Form", "log_decay"]

Form = Literal["softplus", "logsigmoid"]

BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.log_decay, triton.refuses),
    "cpu": Backend(cpu.log_decay, rows.refuses),
    "torch": Backend(eager.log_decay),
    "reference": Backend(reference.log_decay, automatic=False),
}


def log_decay(
    z: Tensor, *, rate: Tensor, bias: Tensor | None = None, form: Form = "softplus", backend: str = "auto"
) -> Tensor:
    """g by `form`, computed and returned in fp32 (fp64 for fp64 inputs).

    Args:
        z:       [..., C]
        rate:    [C], positive
        bias:    [C], None is zeros
        form:    "softplus" or "logsigmoid"
        backend: "reference", "torch", "cpu" (fp32 and bf16 on the CPU), "triton" (on NVIDIA GPUs), or
                 "auto": the fastest installed

    Returns:
        g [..., C].

    Raises:
        ValueError: a shape, dtype or form that does not fit. BackendError: `backend` cannot serve z.
    """
    if z.dim() < 1 or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} of shape {list(z.shape)}; give floating-point [..., C]")
    for name, x in (("rate", rate), ("bias", bias)):
        if x is not None and x.shape != z.shape[-1:]:
            raise ValueError(f"{name} has shape {list(x.shape)}; give [{z.shape[-1]}], one number a channel of z")
    if form not in ("softplus", "logsigmoid"):
        raise ValueError(f"form is {form!r}; give 'softplus' or 'logsigmoid'")
    return BACKENDS[choose("log_decay", BACKENDS, backend, z.device, z.dtype)].run(z, rate, bias, form)
