"""Backend `cpu`: one pass forward and one backward, which computes everything again from z."""

import torch
from torch import Tensor

from glade.ops.log_decay.register import register
from glade.ops.native.rows import call, rows_of

_KINDS = {"softplus": 0, "logsigmoid": 1}


def _parameters(rate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rate = rate.float().contiguous()
    return rate[None], (torch.zeros_like(rate) if bias is None else bias.float().contiguous())[None]


def _forward(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    width = z.shape[-1]
    g = z.new_empty(z.shape, dtype=torch.float32)
    z, parameters = rows_of(z, width), _parameters(rate, bias)
    call("log_decay", z, *parameters, g.view(-1, width), rows=len(z), width=width, kind=_KINDS[form])
    return g


def _backward(
    dg: Tensor, z: Tensor, rate: Tensor, bias: Tensor | None, form: str, of_rate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = z.shape[-1]
    dz, sums = z.new_empty(z.shape), rate.new_empty(2, width, dtype=torch.float32)
    dg, z, parameters = rows_of(dg, width), rows_of(z, width), _parameters(rate, bias)
    matrices = (z, *parameters, dg, dz.view(-1, width))
    call("log_decay_backward", *matrices, rows=len(z), width=width, kind=_KINDS[form], sums=sums)
    return dz, sums[0].to(rate.dtype, copy=True), sums[1].to(rate.dtype if bias is None else bias.dtype, copy=True)


log_decay = register("cpu", _forward, _backward)
