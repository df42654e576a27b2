"""Backend `cpu`: one pass forward and one backward, which computes everything again from z."""

import torch
from torch import Tensor

from glade.ops.native.rows import call, rows_of

_KINDS = {"softplus": 0, "logsigmoid": 1}


def log_decay(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    return _forward(z, rate, bias, form)


def _parameters(rate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rate = rate.float().contiguous()
    return rate[None], (torch.zeros_like(rate) if bias is None else bias.float().contiguous())[None]


@torch.library.custom_op("glade::log_decay_cpu", mutates_args=())
def _forward(z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> Tensor:
    width = z.shape[-1]
    g = z.new_empty(z.shape, dtype=torch.float32)
    z, parameters = rows_of(z, width), _parameters(rate, bias)
    call("log_decay", z, *parameters, g.view(-1, width), rows=len(z), width=width, kind=_KINDS[form])
    return g


@_forward.register_fake
def _(z, rate, bias, form):
    return z.new_empty(z.shape, dtype=torch.float32)


@torch.library.custom_op("glade::log_decay_cpu_backward", mutates_args=())
def _backward(dg: Tensor, z: Tensor, rate: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, rate and bias, the last meaningless where there was none."""
    width = z.shape[-1]
    dz, sums = z.new_empty(z.shape), rate.new_empty(2, width, dtype=torch.float32)
    dg, z, parameters = rows_of(dg, width), rows_of(z, width), _parameters(rate, bias)
    matrices = (z, *parameters, dg, dz.view(-1, width))
    call("log_decay_backward", *matrices, rows=len(z), width=width, kind=_KINDS[form], sums=sums)
    return dz, sums[0].to(rate.dtype, copy=True), sums[1].to(rate.dtype if bias is None else bias.dtype, copy=True)


@_backward.register_fake
def _(dg, z, rate, bias, form):
    return z.new_empty(z.shape), rate.new_empty(rate.shape), (rate if bias is None else bias).new_empty(rate.shape)


def _setup_context(ctx, inputs, output):
    z, rate, bias, ctx.form = inputs
    ctx.save_for_backward(z, rate, bias)


def _autograd_backward(ctx, dg):
    z, rate, bias = ctx.saved_tensors
    dz, drate, dbias = _backward(dg, z, rate, bias, ctx.form)
    return dz, drate, None if bias is None else dbias, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
