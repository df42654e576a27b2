"""What happens between the tokens of one chunk: decayed pair products and the unit lower-triangular inverse.

Both are built by halving. Two tokens r > c of a chunk are told apart at exactly one level, where r lies in the later
half and c in the earlier half of the same block of 2 h tokens. There

    decay(c -> r) = a_{c+1} ... a_r = (a_{m} ... a_r) (a_{c+1} ... a_{m-1}),      m the first token of the later half,

is a product of one factor per row and one per column, and the pairs of the block are one matrix product. The factors
are products of decays a = exp g in [0, 1], carried from level to level by multiplication alone: no logarithm is
summed, no exponent is positive, nothing is clamped, and no row looks at a later one, so the result is finite for any
g <= 0 and causal to the bit. All tensors here are chunk-major, [M, heads, C, dim].
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def decay_levels(a: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For h = 1, 2, ..., C/2 (later halves, earlier halves), then C: (h, prefix, suffix), both [M, heads, C, dim].

    Within its block of h tokens, prefix is the product of a up to and including the row, suffix that of all after it.
    At h = C they are the decay from the chunk's start and to its end. The two tensors are overwritten between levels.
    """
    prefix, suffix = a.clone(), torch.ones_like(a)
    half, C = 1, a.shape[2]
    while half < C:
        yield half, prefix, suffix
        early_prefix, late_prefix = _halves(prefix, half)
        early_suffix, _ = _halves(suffix, half)
        early_suffix *= late_prefix[..., -1:, :]
        late_prefix *= early_prefix[..., -1:, :]
        half *= 2
    yield half, prefix, suffix


def pair_products(rows: list[Tensor], k: Tensor, a: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """For each x of `rows`: M[r, c] = sum_d x[r, d] decay(c -> r)[d] k[c, d] for r > c, zero elsewhere.

    x, k [M, heads, C, K]; a [M, heads, C, K]. Returns the matrices [M, heads, C, C], prefix and suffix of the chunk.
    """
    C = k.shape[2]
    products = [k.new_zeros(*k.shape[:2], C, C) for _ in rows]
    for half, prefix, suffix in decay_levels(a):
        if half == C:
            return products, prefix, suffix
        early = (_halves(k, half)[0] * _halves(suffix, half)[0]).transpose(-1, -2)
        decay = _halves(prefix, half)[1]
        for x, product in zip(rows, products, strict=True):
            _pair_blocks(product, half).copy_((_halves(x, half)[1] * decay) @ early)
    raise AssertionError("a chunk is a power of two")


def pair_products_backward(
    d_products: list[Tensor], rows: list[Tensor], k: Tensor, a: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of `pair_products` in each x of `rows` and in k, with the chunk's prefix and suffix once more.

    Only the strictly lower part of each d_product [M, heads, C, C] is read.
    """
    C = k.shape[2]
    d_rows, dk = [torch.zeros_like(x) for x in rows], torch.zeros_like(k)
    for half, prefix, suffix in decay_levels(a):
        if half == C:
            return d_rows, dk, prefix, suffix
        early_decay, late_decay = _halves(suffix, half)[0], _halves(prefix, half)[1]
        early = _halves(k, half)[0] * early_decay
        for d_product, x, dx in zip(d_products, rows, d_rows, strict=True):
            block = _pair_blocks(d_product, half).contiguous()
            _halves(dx, half)[1].addcmul_(_mix_rows(block, early), late_decay)
            d_early = _mix_rows(block.transpose(-1, -2), _halves(x, half)[1] * late_decay)
            _halves(dk, half)[0].addcmul_(d_early, early_decay)
    raise AssertionError("a chunk is a power of two")


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + T)^-1 for a strictly lower T [M, heads, C, C], in log2 C block steps: X21 = -X22 T21 X11."""
    C = strict.shape[-1]
    inverse = torch.eye(C, dtype=strict.dtype, device=strict.device).expand_as(strict).contiguous()
    half = 1
    while half < C:
        first, second = _diagonal_blocks(inverse, half)
        _pair_blocks(inverse, half).copy_(-(second @ _pair_blocks(strict, half) @ first))
        half *= 2
    return inverse


def _mix_rows(weights: Tensor, x: Tensor) -> Tensor:
    """weights [..., h, h] @ x [..., h, K]. Batched products with an inner size of 1 or 2 cost CPU libraries several
    times as much as the sums they stand for (seven times, h = 1, K = 64)."""
    if weights.shape[-1] > 2:
        return weights @ x
    out = weights[..., :1] * x[..., :1, :]
    return out if weights.shape[-1] == 1 else out.addcmul_(weights[..., 1:], x[..., 1:, :])


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[M, heads, C, dim] -> views of the earlier and the later halves, each [M, heads, C / 2h, h, dim]."""
    blocks = x.unflatten(2, (-1, 2, half))
    return blocks[:, :, :, 0], blocks[:, :, :, 1]


def _grid(square: Tensor, half: int) -> Tensor:
    """[M, heads, C, C] -> view [M, heads, 2, h, 2, h, C / 2h] of the 2h x 2h blocks on its diagonal."""
    return square.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half)).diagonal(dim1=2, dim2=5)


def _pair_blocks(square: Tensor, half: int) -> Tensor:
    """View [M, heads, C / 2h, h, h] of the blocks (later half, earlier half)."""
    return _grid(square, half)[:, :, 1, :, 0].movedim(-1, 2)


def _diagonal_blocks(square: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views [M, heads, C / 2h, h, h] of the first and the second h x h block on the diagonal of each 2h block."""
    grid = _grid(square, half)
    return grid[:, :, 0, :, 0].movedim(-1, 2), grid[:, :, 1, :, 1].movedim(-1, 2)
