"""Backend `cpu`: the recurrence in chunks of 16 tokens by the compiled kernel, forward, backward and decode step.

The kernel's algebra and memory are described in docs/kernels.md, its arguments in native/src/linear_attention/call.h.
A backward keeps, for each value head, the state before every 64 tokens (K * V * 4 bytes) and what each token wrote
(V * 4 bytes a token, only where something is erased); everything else is computed again.
"""

import struct
import sys

import torch
from torch import Tensor

from glade.ops import native
from glade.ops.linear_attention.contract import final_like
from glade.ops.linear_attention.register import register
from glade.ops.native import ABSENT, DTYPES, address, array
from glade.ops.packing import document_borders

__all__ = ["refuses", "run", "step_"]

# tokens between two kept states, as in call.h
CHECKPOINT = 64
assert native.LIBRARY is None or native.LIBRARY.constant("glade_checkpoint") == CHECKPOINT

# the records Call and Step of call.h; an Array is 7 numbers
_CALL = struct.Struct("=8q d 42q 2q 7q 2q 49q 2q")
_STEP = struct.Struct("=6q d 49q 4q")
_NO_SUCH_SLOT = -2


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why calls of this device and dtype cannot be served, or None if they can."""
    return _unfit(device, dtype) or native.ABSENCE


@torch.compiler.assume_constant_result
def say_absence(device: torch.device, dtype: torch.dtype) -> bool:
    """Says on stderr, once in a process, that the kernel would serve these tensors if it were there."""
    global _said
    if not _said and _unfit(device, dtype) is None and native.ABSENCE is not None:
        _said = True
        print(f"glade: backend 'cpu' of linear_attention {native.ABSENCE}; 'torch' serves instead", file=sys.stderr)
    return _said


_said = False


def _unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"needs tensors on the CPU; these are on {device}"
    if dtype == torch.float64:
        return "computes in fp32; these tensors are fp64"
    return None


def _library() -> native.Library:
    assert native.LIBRARY is not None, native.ABSENCE
    return native.LIBRARY


def _check(status: int) -> None:
    if status == _NO_SUCH_SLOT:
        raise ValueError("slots name a row that the state does not have; they must lie in 0 .. rows - 1")
    assert status == 0, status


def _readable(x: Tensor) -> Tensor:
    """A tensor the kernel can read in place: fp32 or bf16, channels next to each other or broadcast."""
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.dim() < 4 or x.shape[-1] <= 1 or x.stride(-1) in (0, 1) else x.contiguous()


def _readable_gates(*gates: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else _readable(x) for x in gates]


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    # asked here: torch takes tens of microseconds to find that there is nothing to do
    return x if x.dtype == dtype else x.to(dtype)


def _room(x: Tensor) -> Tensor:
    """For the gradient of v or of a gate. One number a head lies by heads, so that no two threads write to one line."""
    if x.dim() == 3:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _head(q: Tensor, v: Tensor, borders: Tensor | None, scale: float) -> tuple[float, ...]:
    B, T, H, K = q.shape
    num_sequences = B if borders is None else len(borders) - 1
    return (num_sequences, T, H, v.shape[2], K, v.shape[3], address(borders), torch.get_num_threads(), scale)


def _borders(cu_seqlens: Tensor | None, num_tokens: int) -> Tensor | None:
    return None if cu_seqlens is None else torch.tensor(document_borders(cu_seqlens, num_tokens), dtype=torch.int64)


def _kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    """What `forward` keeps for `backward`: states [M, HV, K, V], and with erase updates [B, T, HV, V]."""
    B, T, HV, V = v.shape
    if cu_seqlens is None:
        num_states = B * ((T + CHECKPOINT - 1) // CHECKPOINT)
    else:
        num_states = T // CHECKPOINT + cu_seqlens.shape[0] - 1
    states = v.new_empty(num_states, HV, q.shape[3], V, dtype=torch.float32)
    return [states] if erase is None else [states, states.new_empty(B, T, HV, V)]


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    """[o, final state], and if `keep` what `_kept_like` says."""
    kept = _kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) if keep else []
    dtype = v.dtype
    borders = _borders(cu_seqlens, v.shape[1])
    q, k, v = (_readable(x) for x in (q, k, v))
    gates = _readable_gates(g, erase, write)
    state = None if state is None else state.contiguous()
    o = v.new_empty(v.shape)
    final = final_like(q, v, cu_seqlens)
    states, updates = (*kept, None, None)[:2]
    record = _CALL.pack(
        *_head(q, v, borders, scale),
        *(number for x in (q, k, v, *gates) for number in array(x)),
        *(address(x) for x in (state, final)),
        *array(o),
        *(address(x) for x in (states, updates)),
        *(ABSENT * 7),
        *(0, 0),
    )
    _check(_library().call("glade_forward", record))
    return [_as(dtype, o), final, *kept]


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    """Gradients of q, k, v, g, erase, write, state, those that are given, in that order."""
    dtypes = [x.dtype for x in (q, k, v, g, erase, write) if x is not None]
    borders = _borders(cu_seqlens, v.shape[1])
    q, k, v, do = (_readable(x) for x in (q, k, v, do))
    gates, d_final = _readable_gates(g, erase, write), None if d_final is None else d_final.contiguous()
    HV, group = v.shape[2], v.shape[2] // q.shape[2]
    # heads of q and k that several value heads read: one gradient for each of these in fp32, summed afterwards
    dq, dk = (
        _room(x) if group == 1 else x.new_empty(*x.shape[:2], HV, x.shape[3], dtype=torch.float32) for x in (q, k)
    )
    others = [None if x is None else _room(x) for x in (v, *gates)]
    d_state = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    states, updates = (*kept, None)[:2]
    record = _CALL.pack(
        *_head(q, v, borders, scale),
        *(number for x in (q, k, v, *gates) for number in array(x)),
        *(0, 0),
        *ABSENT,
        *(address(x) for x in (states, updates)),
        *(number for x in (do, dq, dk, *others) for number in array(x)),
        *(address(x) for x in (d_final, d_state)),
    )
    _check(_library().call("glade_backward", record))
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
    gradients = [x for x in (dq, dk, *others) if x is not None]
    gradients = [_as(dtype, x).contiguous() for x, dtype in zip(gradients, dtypes, strict=True)]
    return gradients if d_state is None else [*gradients, d_state]


def step_(q, k, v, g, erase, write, scale, state, slots) -> Tensor:
    """`linear_attention_step_`: one token of each row, the given rows of the state updated in place."""
    dtype = v.dtype
    q, k, v = (_readable(x.unsqueeze(1)) for x in (q, k, v))
    gates = _readable_gates(*(x if x is None else x.unsqueeze(1) for x in (g, erase, write)))
    B, _, H, K = q.shape
    HV, V = v.shape[2:]
    gapless = state[0].is_contiguous() if len(state) else True
    table = state if gapless else state.contiguous()
    slots = None if slots is None else slots.contiguous()
    o = v.new_empty(v.shape)
    record = _STEP.pack(
        *(B, H, HV, K, V, torch.get_num_threads(), scale),
        *(number for x in (q, k, v, *gates, o) for number in array(x)),
        *(table.data_ptr(), table.stride(0), len(table), address(slots)),
    )
    _check(_library().call("glade_step", record))
    if not gapless:
        state.copy_(table)
    return _as(dtype, o.squeeze(1))


run = register("cpu", forward, backward, _kept_like)
