"""The decode step in one kernel: a token a row, the state read once and written in place, one program a block of it."""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from glade.ops.linear_attention.triton.launch import check_key_dim, device_of, kind_of, strides_of
from glade.ops.linear_attention.triton.tiles import NONE, SCALAR


@triton.jit
def gate_of(x, strides, row, head, channels, num_channels, KIND: tl.constexpr):
    """One token's gate in fp32: [channels], or [1] where it is scalar."""
    at = x + row * strides[0] + head * strides[1]
    if KIND == SCALAR:
        gate = tl.load(at + tl.zeros([1], tl.int32)).to(tl.float32)
    else:
        gate = tl.load(at + channels * strides[2], mask=channels < num_channels, other=0.0).to(tl.float32)
    return gate


@triton.jit
def step_kernel(
    q, k, v, g, erase, write, q_strides, k_strides, v_strides, g_strides, erase_strides, write_strides,
    state, state_strides, slots, o, scale,
    HV, GROUP, K, V,
    KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = VP // BV
    row_head, block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    row, head = (row_head // HV).to(tl.int64), (row_head % HV).to(tl.int64)
    dims, columns = tl.arange(0, KP), block * BV + tl.arange(0, BV)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row)
    state += slot * state_strides[0] + head * state_strides[1]
    state_at = dims[:, None] * state_strides[2] + columns[None, :] * state_strides[3]
    inside = (dims < K)[:, None] & (columns < V)[None, :]
    S = tl.load(state + state_at, mask=inside, other=0.0)
    q_at = q + row * q_strides[0] + (head // GROUP) * q_strides[1] + dims * q_strides[2]
    k_at = k + row * k_strides[0] + (head // GROUP) * k_strides[1] + dims * k_strides[2]
    v_at = v + row * v_strides[0] + head * v_strides[1] + columns * v_strides[2]
    q_row = tl.load(q_at, mask=dims < K, other=0.0).to(tl.float32) * scale
    k_row = tl.load(k_at, mask=dims < K, other=0.0).to(tl.float32)
    update = tl.load(v_at, mask=columns < V, other=0.0).to(tl.float32)
    if GATE != NONE:
        S *= tl.exp(gate_of(g, g_strides, row, head, dims, K, GATE))[:, None]
    if WRITE != NONE:
        update *= gate_of(write, write_strides, row, head, columns, V, WRITE)
    if ERASE != NONE:
        e_row = gate_of(erase, erase_strides, row, head, dims, K, ERASE) * k_row
        update -= tl.sum(S * e_row[:, None], 0)
    S += k_row[:, None] * update[None, :]
    tl.store(state + state_at, S, mask=inside)
    out = tl.sum(S * q_row[:, None], 0)
    tl.store(o + (row * HV + head) * V + columns, out.to(o.dtype.element_ty), mask=columns < V)


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """`linear_attention_step_`: the given rows of `state` move one token on."""
    check_key_dim(q)
    B, HV, V = v.shape
    K = q.shape[-1]
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if o.numel() == 0:
        return o
    KP, VP = triton.next_power_of_2(K), triton.next_power_of_2(V)
    BV = min(VP, max(1, 2048 // KP))
    with device_of(v):
        step_kernel[(B * HV * (VP // BV),)](
            q, k, v, g, erase, write, *(strides_of(x) for x in (q, k, v, g, erase, write)),
            state, state.stride(), slots, o, scale,
            HV, HV // q.shape[1], K, V,
            KP=KP, VP=VP, BV=BV,
            GATE=kind_of(g, 3), ERASE=kind_of(erase, 3), WRITE=kind_of(write, 3), SLOTS=slots is not None,
            num_warps=4,
        )  # fmt: skip
    return o
