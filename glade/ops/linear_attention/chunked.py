"""Backend `torch`: the recurrence chunk by chunk, forward and hand-written backward, on any device torch has.

With C tokens to a chunk, decays a = exp g, c_r the product of a from the chunk's start to row r, t_r from after row
r to its end, and S0 the state before the chunk:

    e = erase * k      z = write * v      E = c * e      Q = scale * c * q      Kt = t * k
    T[r, s] = sum_d e[r, d] decay(s -> r)[d] k[s, d]   (r > s)       P[r, s] likewise with scale * q, diagonal included
    A = (I + T)^-1     R = A (z - E S0)      o = Q S0 + P R          S_C = Diag(c_C) S0 + Kt^T R

and backwards, chunks last to first, with dR^ = A^T dR:

    dR  = P^T do + Kt dS_C          dS0 = Q^T do + Diag(c_C) dS_C - E^T dR^           dz = dR^
    dP  = tril(do R^T)              dT  = -tril(dR^ R^T, -1)
    dQ  = do S0^T                   dE  = -dR^ S0^T                                   dKt = R dS_C^T

The gate needs no derivative of the products above: per channel, g at row r scales everything that decays across it, so

    dg_r = sum_{i >= r} (q dq + e de - k dk')_i  +  sum_{i < r} (Kt dKt)_i  +  rowsum(Diag(c_C) S0 * dS_C)

where dk' is what q and e of the same chunk ask of k: the path through Kt is the second sum. (Without erase this is
the identity of arXiv:2312.06635, section 4.3.)
"""

import torch
from torch import Tensor

from glade.ops.linear_attention.chunk_algebra import (
    pair_products,
    pair_products_backward,
    unit_lower_inverse,
)
from glade.ops.linear_attention.chunk_layout import ChunkLayout, chunk_layout, chunk_size, max_chunks
from glade.ops.linear_attention.contract import final_like, over_value_heads, per_channel, state_dtype
from glade.ops.linear_attention.reference import step_
from glade.ops.linear_attention.register import register

__all__ = ["run", "step_"]

CHUNK = 32


class _Chunks:
    """The inputs in chunk-major form, gates applied: all that both passes read. Absent gates are None.

    q (scaled), k, e [M, HV, C, K]; v, z [M, HV, C, V]; a [M, HV, C, K or 1].
    """

    def __init__(self, layout: ChunkLayout, q, k, v, g, erase, write, scale: float):
        dtype, HV = state_dtype(v), v.shape[2]

        def chunks(x: Tensor | None) -> Tensor | None:
            x = per_channel(x, 4)
            return None if x is None else layout.to_chunks(x, dtype)

        self.q = layout.to_chunks(over_value_heads(q, HV), dtype) * scale
        self.k = layout.to_chunks(over_value_heads(k, HV), dtype)
        self.v = layout.to_chunks(v, dtype)
        decay, self.erase, self.write = chunks(g), chunks(erase), chunks(write)
        self.a = None if decay is None else decay.exp()
        self.e = None if self.erase is None else self.erase * self.k
        self.z = self.v if self.write is None else self.write * self.v

    @property
    def rows(self) -> list[Tensor]:
        """What meets k inside a chunk: q, and e where something is erased."""
        return [self.q] if self.e is None else [self.q, self.e]


class _Intra:
    """Everything of a chunk that does not depend on the state: P, A [M, HV, C, C], and the decays to its two ends."""

    def __init__(self, x: _Chunks):
        C = x.k.shape[2]
        if x.a is not None and x.a.shape[-1] > 1:
            products, self.prefix, self.suffix = pair_products(x.rows, x.k, x.a)
        else:
            self.pair_decay, self.prefix, self.suffix = _scalar_decay(x)
            products = [(row @ x.k.transpose(-1, -2)) * self.pair_decay for row in x.rows]
        self.P = products[0]
        self.P.diagonal(dim1=-2, dim2=-1).copy_((x.q * x.k).sum(-1))
        self.A = unit_lower_inverse(products[1]) if x.e is not None else None
        self.Q = _times(self.prefix, x.q)
        self.E = None if x.e is None else _times(self.prefix, x.e)
        self.Kt = _times(self.suffix, x.k)
        # [M, HV, K or 1, 1]: what the chunk leaves of the state it found
        self.total = None if self.prefix is None else self.prefix[:, :, C - 1, :, None]

    def into_state(self, rows: slice) -> Tensor:
        """[E; Q] of some chunks, which read the state in one product."""
        return self.Q[rows] if self.E is None else torch.cat([self.E[rows], self.Q[rows]], dim=2)


def _scalar_decay(x: _Chunks) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The strictly lower matrix of decays when all channels share one (or there is none), prefix and suffix."""
    C = x.k.shape[2]
    if x.a is None:
        return x.k.new_ones(C, C).tril(-1), None, None
    ones = torch.ones_like(x.a)
    (decay,), prefix, suffix = pair_products([ones], ones, x.a)
    return decay, prefix, suffix


def _times(decay: Tensor | None, x: Tensor) -> Tensor:
    return x if decay is None else decay * x


def forward(q, k, v, g, erase, write, scale, state, cu_seqlens, keep) -> list[Tensor]:
    """[o, final state], and if `keep` the state before each chunk and R, as `_kept_like` shapes them."""
    layout = chunk_layout(v, cu_seqlens, chunk_size(v.shape[1], CHUNK))
    S = _state_or_zeros(layout, q, v, state, cu_seqlens)
    x = _Chunks(layout, q, k, v, g, erase, write, scale)
    intra = _Intra(x)
    C = layout.chunk
    o = torch.empty_like(x.z)
    R = x.z if x.e is None else torch.empty_like(x.z)
    kept = _kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) if keep else []
    if keep and x.e is not None:
        R = kept[1][: layout.num_chunks]
    for rows in layout.steps():
        live = S[: rows.stop - rows.start]
        if keep:
            kept[0][rows] = live
        read = intra.into_state(rows) @ live
        if intra.A is not None:
            torch.matmul(intra.A[rows], x.z[rows] - read[:, :, :C], out=R[rows])
        o[rows] = read[:, :, -C:]
        if intra.total is not None:
            live *= intra.total[rows]
        live += intra.Kt[rows].transpose(-1, -2) @ R[rows]
    o += intra.P @ R
    return [layout.to_tokens(o, v.dtype), layout.from_ranks(S), *kept]


def backward(do, d_final, q, k, v, g, erase, write, scale, state, cu_seqlens, kept) -> list[Tensor]:
    """Gradients of q, k, v, g, erase, write, state, those that are given, in that order."""
    layout = chunk_layout(v, cu_seqlens, chunk_size(v.shape[1], CHUNK))
    x = _Chunks(layout, q, k, v, g, erase, write, scale)
    intra = _Intra(x)
    states, R = (y[: layout.num_chunks] for y in (*kept, x.z)[:2])
    do = layout.to_chunks(do, R.dtype)
    dR, dS_after, dS = _backward_states(layout, intra, do, _state_or_zeros(layout, q, v, d_final, cu_seqlens))

    # what reaches q, e, k from inside the chunk, from the state before it and to the state after it
    read = do if intra.E is None else torch.cat([-dR, do], dim=2)
    d_read = read @ states.transpose(-1, -2)
    dKt = R @ dS_after.transpose(-1, -2)
    d_products = [do @ R.transpose(-1, -2)] + ([] if intra.E is None else [-dR @ R.transpose(-1, -2)])
    diagonal = d_products[0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    d_rows, dk = _pairs_backward(d_products, x, intra)
    C = layout.chunk
    dq = d_rows[0] + _times(intra.prefix, d_read[:, :, -C:]) + diagonal * x.k
    dk += diagonal * x.q
    de = None if x.e is None else d_rows[1] + _times(intra.prefix, d_read[:, :, :C])
    dg = None
    if x.a is not None and intra.total is not None:
        per_token = x.q * dq - x.k * dk
        if de is not None and x.e is not None:
            per_token.addcmul_(x.e, de)
        carried = (intra.total * states * dS_after).sum(-1).unsqueeze(2)
        dg = _gate_gradient(per_token, intra.Kt * dKt, carried, scalar=x.a.shape[-1] == 1)
    dk += _times(intra.suffix, dKt)
    if de is not None:
        dk += _times(x.erase, de)
    gradients = [_over_groups(layout, dq * scale, q), _over_groups(layout, dk, k)]
    gradients.append(layout.to_tokens(_times(x.write, dR), v.dtype))
    d_erase = None if de is None else x.k * de
    for gate, d_gate in ((g, dg), (erase, d_erase), (write, x.v * dR)):
        if gate is not None and d_gate is not None:
            if gate.dim() == 3 and d_gate.shape[-1] > 1:
                d_gate = d_gate.sum(-1, keepdim=True)
            gradients.append(layout.to_tokens(d_gate, gate.dtype).view(gate.shape))
    return gradients if state is None else [*gradients, layout.from_ranks(dS)]


def _backward_states(layout: ChunkLayout, intra: _Intra, do: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state pass, last chunk to first: dR^ [M, HV, C, V], dS_C [M, HV, K, V] of each chunk, and dS before all."""
    dR = intra.P.transpose(-1, -2) @ do
    dS_after = dS.new_empty(layout.num_chunks, *dS.shape[1:])
    for rows in reversed(layout.steps()):
        live = dS[: rows.stop - rows.start]
        dS_after[rows] = live
        dR[rows] += intra.Kt[rows] @ live
        upward = do[rows]
        if intra.A is not None:
            dR[rows] = intra.A[rows].transpose(-1, -2) @ dR[rows]
            upward = torch.cat([-dR[rows], upward], dim=2)
        if intra.total is not None:
            live *= intra.total[rows]
        live += intra.into_state(rows).transpose(-1, -2) @ upward
    return dR, dS_after, dS


def _pairs_backward(d_products: list[Tensor], x: _Chunks, intra: _Intra) -> tuple[list[Tensor], Tensor]:
    """What the strictly lower pairs give to q (and e) and to k."""
    if x.a is not None and x.a.shape[-1] > 1:
        d_rows, dk, _, _ = pair_products_backward(d_products, x.rows, x.k, x.a)
        return d_rows, dk
    decayed = [d * intra.pair_decay for d in d_products]
    d_rows = [d @ x.k for d in decayed]
    dk = sum(d.transpose(-1, -2) @ row for d, row in zip(decayed, x.rows, strict=True))
    assert isinstance(dk, Tensor)
    return d_rows, dk


def _gate_gradient(per_token: Tensor, to_end: Tensor, carried: Tensor, scalar: bool) -> Tensor:
    """dg from its three sums over a chunk (see the head of the file); scalar gates sum over channels first."""
    if scalar:
        per_token, to_end, carried = (y.sum(-1, keepdim=True) for y in (per_token, to_end, carried))
    after = per_token.flip(2).cumsum(2).flip(2)
    before = to_end.cumsum(2) - to_end
    return after + before + carried


def _state_or_zeros(
    layout: ChunkLayout, q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if state is not None:
        return layout.to_ranks(state)
    return final_like(q, v, cu_seqlens).zero_()


def _over_groups(layout: ChunkLayout, dx: Tensor, x: Tensor) -> Tensor:
    """The gradient of q or k [B, T, H, K]: the sum over the value heads that read each head, rounded afterwards."""
    group = dx.shape[1] // x.shape[2]
    if group == 1:
        return layout.to_tokens(dx, x.dtype)
    return layout.to_tokens(dx, dx.dtype).unflatten(2, (-1, group)).sum(3).to(x.dtype)


def _kept_like(q, k, v, g, erase, write, scale, state, cu_seqlens) -> list[Tensor]:
    """What `forward` keeps for `backward`: states [M, HV, K, V], and R [M, HV, C, V] unless it is z (no erase)."""
    B, T, HV, V = v.shape
    C = chunk_size(T, CHUNK)
    M = max_chunks(B, T, cu_seqlens, C)
    states = v.new_empty(M, HV, q.shape[3], V, dtype=state_dtype(v))
    return [states] if erase is None else [states, states.new_empty(M, HV, C, V)]


run = register("torch", forward, backward, _kept_like)
