"""Which kernels serve a call: those for scalar gates read q and k as they are, the others make gated copies of them."""

import torch
from torch import Tensor

from glade.ops.linear_attention.triton import scalar_op, vector_op
from glade.ops.linear_attention.triton.configs import KINDS, is_scalar
from glade.ops.linear_attention.triton.launch import kind_of


def _path(v: Tensor, g: Tensor | None, erase: Tensor | None):
    corner = tuple(KINDS[kind_of(x, 4)] for x in (g, erase))
    return scalar_op if is_scalar(corner, v.dtype != torch.bfloat16) else vector_op


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    """[o, final state], and if `keep` what `backward` needs of it."""
    return _path(v, g, erase).forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep)


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    """Gradients of q, k, v, g, erase, write, state, those that are given, in that order."""
    return _path(v, g, erase).backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept)


def kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    """What `forward` keeps, from shapes alone."""
    return _path(v, g, erase).kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens)
