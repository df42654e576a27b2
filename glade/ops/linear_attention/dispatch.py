"""Which code runs a call: device and dtype in, backend out. Nothing else about the call is consulted.

A backend is one row of `BACKENDS`. A named backend runs exactly that or raises `BackendError`, which names one that
can; `auto` takes the first row that serves the device and dtype. No environment variable changes what runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glade.errors import BackendError
from glade.ops.linear_attention import chunked, cpu, reference, triton


class Backend(NamedTuple):
    name: str
    run: Callable[..., tuple[Tensor, Tensor]]
    step_: Callable[..., Tensor]
    # why this device and dtype cannot be served, or None if they can
    refuses: Callable[[torch.device, torch.dtype], str | None]
    automatic: bool = True


def _serves_all(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


# in the order in which `auto` asks
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("triton", triton.run, triton.step_, triton.refuses),
        Backend("cpu", cpu.run, cpu.step_, cpu.refuses),
        Backend("torch", chunked.run, chunked.step_, _serves_all),
        Backend("reference", reference.run, reference.step_, _serves_all, automatic=False),
    )
}


def backend_for(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The row of `BACKENDS` that runs a call on `device` with inputs of `dtype`.

    Raises:
        BackendError: no such backend, or it cannot serve this device and dtype.
    """
    if name == "auto":
        chosen = next(b for b in BACKENDS.values() if b.automatic and b.refuses(device, dtype) is None)
        if chosen.name == "torch":
            cpu.say_absence(device, dtype)
        return chosen
    reason = BACKENDS[name].refuses(device, dtype) if name in BACKENDS else "is not installed here"
    if reason is not None:
        able = " or ".join(map(repr, available_backends(device, dtype)))
        raise BackendError(f"backend {name!r} {reason}. Use {able}, or 'auto'")
    return BACKENDS[name]


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """The names that a call with tensors of this device and dtype can give as `backend`, `auto`'s choice first."""
    return [b.name for b in BACKENDS.values() if b.refuses(torch.device(device), dtype) is None]
