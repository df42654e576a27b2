"""Which kernels serve a call: those for scalar gates read q and k as they are, the others make gated copies of them."""

from torch import Tensor

from glade.ops.linear_attention.triton import scalar_op, vector_op


def _path(g: Tensor | None, erase: Tensor | None):
    return vector_op if any(x is not None and x.dim() == 4 for x in (g, erase)) else scalar_op


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    """[o, final state], and if `keep` what `backward` needs of it."""
    return _path(g, erase).forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep)


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    """Gradients of q, k, v, g, erase, write, state, those that are given, in that order."""
    return _path(g, erase).backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept)


def kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    """What `forward` keeps, from shapes alone."""
    return _path(g, erase).kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens)
