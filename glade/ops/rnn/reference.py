"""The recurrence as its definition: one token of one document at a time, left to autograd."""

import torch
from torch import Tensor

from glade.ops.packing import document_borders


def step(x: Tensor, h: Tensor, w_hh: Tensor, activation: str) -> Tensor:
    """h_t = act(W_hh h_{t-1} + x_t) for rows x [..., D] and h [..., D]."""
    a = h @ w_hh.T + x
    return torch.tanh(a) if activation == "tanh" else a.clamp(0, 1)


def rnn(
    x: Tensor, w_hh: Tensor, activation: str, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        documents = list(x)
    else:
        borders = document_borders(cu_seqlens, x.shape[1])
        documents = [x[0, borders[i] : borders[i + 1]] for i in range(len(borders) - 1)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, final = [], []
    for i in range(len(documents)):
        h = x.new_zeros(x.shape[2], dtype=dtype) if state is None else state[i].to(dtype)
        for x_t in documents[i]:
            h = step(x_t.to(dtype), h, w_hh.to(dtype), activation)
            y.append(h.to(x.dtype))
        final.append(h)
    if not final:
        return torch.zeros_like(x), x.new_zeros(0, x.shape[2], dtype=dtype)
    return (torch.stack(y).view(x.shape) if y else torch.zeros_like(x)), torch.stack(final)
