"""The convolution as its definition: one document at a time, tap by tap, left to autograd."""

import torch
from torch import Tensor

from glade.ops.packing import document_borders
from glade.ops.short_conv.activation import Activation, activate


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    l2norm_heads: int | None,
    l2norm_channels: int,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        documents = list(x)
    else:
        borders = document_borders(cu_seqlens, x.shape[1])
        documents = [x[0, borders[i] : borders[i + 1]] for i in range(len(borders) - 1)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_past = weight.shape[1] - 1
    outputs, states = [], []
    for i in range(len(documents)):
        past = x.new_zeros(num_past, x.shape[2], dtype=dtype) if state is None else state[i].T.to(dtype)
        inputs = torch.cat([past, documents[i].to(dtype)])  # [W - 1 + tokens, D]
        taps = weight.to(dtype)
        a = torch.zeros_like(documents[i], dtype=dtype)
        for j in range(num_past + 1):
            a = a + taps[:, j] * inputs[j : j + len(documents[i])]
        if bias is not None:
            a = a + bias.to(dtype)
        outputs.append(activate(a, activation, l2norm_heads, l2norm_channels).to(x.dtype))
        states.append(inputs[len(inputs) - num_past :].T.to(x.dtype if state is None else state.dtype))
    if not documents:
        return torch.zeros_like(x), x.new_zeros(0, x.shape[2], num_past)
    y = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return y, torch.stack(states)
