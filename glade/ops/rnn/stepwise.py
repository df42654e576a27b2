"""The recurrence for all documents abreast, one matrix product a token, with its own backward.

Tokens are put in the order they are computed in: the first token of every document, then every second one, longest
document first, so that each step is a run of rows and a document that has ended costs nothing. The backward walks the
steps from the last, and makes the gradient of W_hh in one product at the end instead of one [D, D] sum a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glade.ops.packing import document_borders


def rnn(
    x: Tensor, w_hh: Tensor, activation: str, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, final, _ = _forward(x, w_hh, state, cu_seqlens, activation)
    return y, final


class _Plan(NamedTuple):
    """The order of computation of M tokens of N documents."""

    order: Tensor  # [N] documents, longest first
    tokens: Tensor  # [M] which token is computed as the 1st, 2nd, ...
    rows: list[int]  # how many documents still have a token at each step
    before: Tensor  # [M] row of [N sorted states; M computed tokens] that holds the hidden state before each token
    last: Tensor  # [N] row of the same that holds each sorted document's final state


def _plan(x: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    B, T, _ = x.shape
    return _plan_of_rows(B, T, x.device) if cu_seqlens is None else _plan_of_documents(T, cu_seqlens, x.device)


def _plan_of_rows(B: int, T: int, device: torch.device) -> _Plan:
    """Made where it is used, since nothing may be copied there from the host while a decode step is recorded."""
    row, step = torch.arange(B, device=device), torch.arange(T, device=device)[:, None]
    return _Plan(row, (row * T + step).flatten(), [B] * T, torch.arange(B * T, device=device), row + B * T)


def _plan_of_documents(num_tokens: int, cu_seqlens: Tensor, device: torch.device) -> _Plan:
    border = torch.tensor(document_borders(cu_seqlens, num_tokens))
    starts, lengths = border[:-1], border.diff()
    order = lengths.argsort(descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    N, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    # [longest, N]: step t of sorted document i exists while t < lengths[i]; flattening keeps the order of the steps
    step = torch.arange(longest)[:, None]
    exists = step < lengths
    rows = exists.sum(1)
    offset = rows.cumsum(0) - rows
    column = torch.arange(N).expand(longest, N)
    row_before = torch.cat([torch.zeros(1, dtype=torch.int64), offset[:-1] + N])[: len(rows), None] + column
    row_last = torch.cat([torch.zeros(1, dtype=torch.int64), offset + N])[lengths] + torch.arange(N)
    return _Plan(
        order.to(device),
        (starts + step)[exists].to(device),
        rows.tolist(),
        row_before[exists].to(device),
        row_last.to(device),
    )


@torch.library.custom_op("glade::rnn", mutates_args=())
def _forward(
    x: Tensor, w_hh: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the hidden states in order of computation, kept for the backward."""
    plan = _plan(x, cu_seqlens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = x.reshape(-1, x.shape[2])[plan.tokens].to(dtype)
    start = _sorted_state(x, state, plan.order, dtype)
    transition = w_hh.T.to(dtype)
    hidden = torch.empty_like(inputs)
    h, offset = start, 0
    # A custom op still sees the caller's autocast, which would put the products in its dtype
    with torch.autocast(x.device.type, enabled=False):
        for n in plan.rows:
            here = hidden[offset : offset + n]
            torch.addmm(inputs[offset : offset + n], h[:n], transition, out=here)
            h = here.tanh_() if activation == "tanh" else here.clamp_(0, 1)
            offset += n
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y.view(hidden.shape)[plan.tokens] = hidden.to(x.dtype)
    final = torch.empty_like(start)
    final[plan.order] = torch.cat([start, hidden])[plan.last]
    return y, final, hidden


def _sorted_state(x: Tensor, state: Tensor | None, order: Tensor, dtype: torch.dtype) -> Tensor:
    if state is None:
        return x.new_zeros(len(order), x.shape[2], dtype=dtype)
    return state[order].to(dtype)


@_forward.register_fake
def _(x, w_hh, state, cu_seqlens, activation):
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(num_documents, x.shape[2], dtype=dtype)
    return x.new_empty(x.shape), final, x.new_empty(x.shape[0] * x.shape[1], x.shape[2], dtype=dtype)


@torch.library.custom_op("glade::rnn_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    w_hh: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    hidden: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w_hh and state (meaningless where there was none)."""
    plan = _plan(x, cu_seqlens)
    start = _sorted_state(x, state, plan.order, hidden.dtype)
    weight = w_hh.to(hidden.dtype)
    # One buffer for the gradients of the start and of all hidden states, laid out as `before` and `last` point into it
    dh = torch.cat([torch.zeros_like(start), dy.reshape(hidden.shape)[plan.tokens].to(hidden.dtype)])
    dh[plan.last] += dfinal[plan.order].to(hidden.dtype)
    da = dh[len(start) :]
    # At slide's two corners the derivative is taken as 0, as in the saturated part
    slope = 1 - hidden.square() if activation == "tanh" else ((hidden > 0) & (hidden < 1)).to(hidden.dtype)
    offset = len(hidden)
    with torch.autocast(x.device.type, enabled=False):
        for t in reversed(range(len(plan.rows))):
            n = plan.rows[t]
            offset -= n
            here = da[offset : offset + n]
            here *= slope[offset : offset + n]
            first = offset + len(start) - plan.rows[t - 1] if t else 0
            dh[first : first + n].addmm_(here, weight)
        dw_hh = da.T @ torch.cat([start, hidden])[plan.before]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dx.view(hidden.shape)[plan.tokens] = da.to(x.dtype)
    dstate = torch.empty_like(start)
    dstate[plan.order] = dh[: len(start)]
    return dx, dw_hh.to(w_hh.dtype), dstate.to(dstate.dtype if state is None else state.dtype)


@_backward.register_fake
def _(dy, dfinal, x, w_hh, state, cu_seqlens, hidden, activation):
    dstate = torch.empty_like(dfinal) if state is None else torch.empty_like(state)
    return x.new_empty(x.shape), w_hh.new_empty(w_hh.shape), dstate


def _setup_context(ctx, inputs, output):
    x, w_hh, state, cu_seqlens, ctx.activation = inputs
    ctx.save_for_backward(x, w_hh, state, cu_seqlens, output[2])


def _autograd_backward(ctx, dy, dfinal, dhidden):
    x, w_hh, state, cu_seqlens, hidden = ctx.saved_tensors
    dx, dw_hh, dstate = _backward(dy, dfinal, x, w_hh, state, cu_seqlens, hidden, ctx.activation)
    return dx, dw_hh, None if state is None else dstate, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
