"""Sums of logs, and pairs of tokens by levels, as the kernels for a vector decay have them, channels by tokens.

A sum of logs is a product with a matrix of zeros and ones, and what the pairs of a level add is a product with the
matrix of a chunk's pairs of which those of other levels are zero; both are made once for all channels.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from glade.ops.linear_attention.triton.hopper.pipeline import BY_VALUES, left_of
from glade.ops.linear_attention.triton.tiles import LEAST_LOG, LOG2_E

LEVELS = gl.constexpr(5)  # of the pairs of 32 tokens
UP_TO, BEHIND = gl.constexpr(5), gl.constexpr(6)  # of `ones`, behind a matrix for each level


@gluon.jit
def tile_at(number, first, step, HV):
    """Of the tiles that a program takes, every `step`-th from `first` on: which one it is, its chunk or span, and its
    head. Neighbouring programs take neighbouring heads."""
    tile = first + number * step
    return tile, tile // HV, tile % HV


@gluon.jit
def nothing_at(number):
    """0, which the compiler takes for another number each time: of a place in shared memory that it knew, it would find
    what a product needs before all loops, and keep it in registers that are not there."""
    return number * (gl.num_programs(2) - 1)


@gluon.jit
def log2_decay(g):
    """That of `tiles.py`, which Gluon cannot call."""
    return gl.maximum(g * LOG2_E, LEAST_LOG)


@gluon.jit
def in_two_parts(x, SUMS: gl.constexpr):
    """x as the sum of two of bf16, left sides of products."""
    # rounded by hand: conversions one by one take the place of exponentials
    high = ((x.to(gl.int32, bitcast=True) + 0x8000) & -0x10000).to(gl.float32, bitcast=True)
    rest = (x - high).to(gl.bfloat16)
    return gl.convert_layout(high.to(gl.bfloat16), left_of(SUMS)), gl.convert_layout(rest, left_of(SUMS))


@gluon.jit
def store_ones(ones, other, token):
    """[others, tokens], ones where an other's log is part of a token's sum: by level, those between the token and the
    first one of the later half of its block; all up to it; and all behind it."""
    for level in gl.static_range(LEVELS):
        anchor = (token | (1 << level)) & (-(1 << level))
        between = ((other > anchor) & (other <= token)) | ((other > token) & (other <= anchor))
        ones.index(level).store(gl.where(between, 1.0, 0.0).to(gl.bfloat16))
    ones.index(UP_TO).store(gl.where(other <= token, 1.0, 0.0).to(gl.bfloat16))
    ones.index(BEHIND).store(gl.where(other > token, 1.0, 0.0).to(gl.bfloat16))


@gluon.jit
def sum_of(high, rest, ones, zeros):
    """The product of a sum in two parts with zeros and ones, under way."""
    return warpgroup_mma(rest, ones, warpgroup_mma(high, ones, zeros, is_async=True), is_async=True)


@gluon.jit
def store_levels(by_level, pairs, other, token, FIRST: gl.constexpr):
    """The pairs of each level by themselves, from place FIRST on; they lie on both sides of the diagonal."""
    for level in gl.static_range(LEVELS):
        by_level.index(FIRST + level).store(gl.where(((other ^ token) >> level) == 1, pairs, 0.0).to(gl.bfloat16))


@gluon.jit
def with_themselves(pairs, other, token):
    """The pairs on the diagonal, for each token."""
    return gl.sum(gl.where(other == token, pairs.to(gl.float32), 0.0), 0)


@gluon.jit
def decays_of_halves(logs, row, level):
    """Between the tokens of a level's later halves, and those of the earlier ones, and the first token of a later half;
    zero for the others."""
    x = gl.exp2(logs)
    late = (((row >> level) & 1) == 1)[None, :]
    return gl.where(late, x, 0.0), gl.where(late, 0.0, x)


@gluon.jit
def diagonal_of(x, SUMS: gl.constexpr):
    """Of the sums of a product [channels, channels]."""
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))[:, None]
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))[None, :]
    return gl.convert_layout(gl.sum(gl.where(row == column, x, 0.0), 1), gl.SliceLayout(1, SUMS))


@gluon.jit
def store_rows(to, stride, x):
    """x [channels, tokens], by tokens."""
    channel = gl.arange(0, x.shape[0], gl.SliceLayout(1, BY_VALUES))[:, None]
    token = gl.arange(0, x.shape[1], gl.SliceLayout(0, BY_VALUES))[None, :]
    gl.store(to + channel + token * stride, gl.convert_layout(x.to(to.dtype.element_ty), BY_VALUES))
