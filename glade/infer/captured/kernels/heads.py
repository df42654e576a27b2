"""The heads of a linear mixer: norm and rotation of q and k, gates, the recurrence on the state in place, the output.

    S' = Diag(exp g) S,   S = S' - k (erase * k)^T S' + k (write * v)^T,   o = scale S^T q,   y = norm(o) * act(gate)

A program has one value head of one row, with all of its state: what norms and gates need is its own.
"""

# Triton need not be installed where there is no GPU
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from glade.infer.captured.kernels.overlap import wait

FEATURE_ELU1, FEATURE_RELU = tl.constexpr(1), tl.constexpr(2)
# where g comes from
NO_DECAY, TABLE, LOGSIGMOID, TEMPERED, SOFTPLUS, BOUNDED = (tl.constexpr(i) for i in range(6))
# none, one number a head, or from VECTORS on a vector of erase and one of write
NO_GATE, BETA, ETA, VECTORS, VECTORS_ETA = (tl.constexpr(i) for i in range(5))
EPS_FLOOR, EPS_ADD = tl.constexpr(1), tl.constexpr(2)
NO_NORM, RMS, RMS_EPS_OUTSIDE, LAYER = (tl.constexpr(i) for i in range(4))
NO_OUTPUT_GATE, SILU_GATE, SIGMOID_GATE = (tl.constexpr(i) for i in range(3))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def featured(x, SILU: tl.constexpr, FEATURES: tl.constexpr):
    if SILU:
        x *= tl.sigmoid(x)
    if FEATURES == FEATURE_ELU1:
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    if FEATURES == FEATURE_RELU:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def turned(x, at, scale, dims, position, log_theta, D: tl.constexpr, SILU: tl.constexpr, FEATURES: tl.constexpr):
    """x with its first D channels rotated; `at` points to the vector that x = scale * featured(...) was read from."""
    HALF: tl.constexpr = D // 2
    low = dims < HALF
    partner = tl.where(low, dims + HALF, dims - HALF)
    other = tl.load(at + partner, mask=dims < D, other=0.0).to(tl.float32)
    other = scale * featured(other, SILU, FEATURES)
    pair = tl.where(low, dims, dims - HALF).to(tl.float32)
    angle = position.to(tl.float32) * tl.exp(-log_theta * 2 * pair / D)
    cos, sin = tl.cos(angle), tl.sin(angle)
    return tl.where(dims < D, x * cos + tl.where(low, -other, other) * sin, x)


@triton.jit
def read_head(
    numbers, at, dims, K, position, log_theta,
    SILU: tl.constexpr, FEATURES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q or k of one head as the recurrence takes it, fp32, from its numbers, which are at `at`."""
    x = featured(numbers, SILU, FEATURES)
    x = tl.where(dims < K, x, 0.0)
    scale = 1.0
    if UNIT:
        scale = tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
    x *= scale
    if D > 0:
        x = turned(x, at, scale, dims, position, log_theta, D, SILU, FEATURES)
    return x


@triton.jit
def read(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def log_decay(z, a_log, bias, constant, DECAY: tl.constexpr):
    """g <= 0 from the numbers z, and what was learned of their head and of themselves."""
    if DECAY == LOGSIGMOID:
        g = -softplus(-z) / constant
    if DECAY == TEMPERED:
        g = -softplus(-z / constant)
    if DECAY == SOFTPLUS:
        g = -tl.exp(a_log) * softplus(z + bias)
    if DECAY == BOUNDED:
        g = constant * tl.sigmoid(tl.exp(a_log) * (z + bias))
    return g


@triton.jit
def kaczmarz(eta, k, eps, MODE: tl.constexpr):
    energy = tl.sum(k * k, 0)
    if MODE == EPS_FLOOR:
        energy = tl.maximum(energy, eps)
    else:
        energy += eps
    return tl.sigmoid(eta) / energy


@triton.jit
def gated(o, gate, weight, bias, mean, factor, NORM: tl.constexpr, AFFINE: tl.constexpr, OUTPUT_GATE: tl.constexpr):
    """norm(o) * act(gate)."""
    if NORM != NO_NORM:
        o = (o - mean) * factor
        if AFFINE:
            o *= weight
            if NORM == LAYER:
                o += bias
    if OUTPUT_GATE != NO_OUTPUT_GATE:
        act = tl.sigmoid(gate)
        if OUTPUT_GATE == SILU_GATE:
            act *= gate
        o *= act
    return o


@triton.jit
def norm_factors(total, squares, V, eps, NORM: tl.constexpr):
    """(mean, factor): the norm is (o - mean) * factor."""
    mean = 0.0
    factor = 1.0
    if NORM == RMS:
        factor = tl.rsqrt(squares / V + eps)
    if NORM == RMS_EPS_OUTSIDE:
        factor = 1 / (tl.sqrt(squares / V) + eps)
    if NORM == LAYER:
        mean = total / V
        factor = tl.rsqrt(tl.maximum(squares / V - mean * mean, 0.0) + eps)
    return mean, factor


@triton.jit
def read_norm(weight, bias, columns, inside, NORM: tl.constexpr, AFFINE: tl.constexpr):
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale = read(weight + columns, inside)
        if NORM == LAYER:
            shift = read(bias + columns, inside)
    return scale, shift


@triton.jit
def read_factor(factors, bias, at, inside, RANK: tl.constexpr):
    """Rows `at` of the second factors [.., RANK], and their biases."""
    rows = tl.load(factors + at[:, None] * RANK + tl.arange(0, RANK)[None, :], mask=inside[:, None], other=0.0)
    shift = 0.0
    if bias is not None:
        shift = read(bias + at, inside)
    return rows, shift


@triton.jit
def heads_kernel(
    z, z_stride, q, k, v, decay, erase, write, output_gate, out, out_stride, slots, positions, live, length,
    state, a_log, dt_bias, norm_weight, norm_bias, norm_eps, scale, decay_constant, kaczmarz_eps, log_theta,
    factors, factors_bias, HV, GROUP, DECAY_GROUP,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, NUM_V: tl.constexpr, SILU: tl.constexpr,
    FEATURES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DECAY: tl.constexpr, DECAY_CHANNELS: tl.constexpr,
    GATES: tl.constexpr, EPS_MODE: tl.constexpr, CLIP: tl.constexpr, DOUBLED: tl.constexpr, RANK: tl.constexpr,
    NORM: tl.constexpr, AFFINE: tl.constexpr, OUTPUT_GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """q, k, v, decay, erase, write, output_gate: where each begins in a row of z.

    RANK: with it, at `decay` and `output_gate` stand RANK numbers for all heads, to be multiplied by rows of `factors`:
    those of all decays, then those of all gates. Only where decays are of channels, and V is one block.

    What the kernel reads it asks for at once: a number asked for after a sum over the program comes that much later.
    """
    row, head = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    slot = tl.load(slots + row)
    dims = tl.arange(0, KP)
    inside_k = dims < K
    state += (slot * HV + head) * K * V
    columns = tl.arange(0, BV)
    inside = columns < V
    key_head, decay_head = head // GROUP, head // DECAY_GROUP
    decay_at = decay_head * K + dims
    first = tl.load(state + dims[:, None] * V + columns[None, :], mask=inside_k[:, None] & inside[None, :], other=0.0)
    weight, bias = read_norm(norm_weight, norm_bias, columns, inside, NORM, AFFINE)
    rate, rate_bias = 0.0, 0.0
    if DECAY >= SOFTPLUS:
        rate = tl.load(a_log + decay_head).to(tl.float32)
        if DECAY_CHANNELS:
            rate_bias = read(dt_bias + decay_at, inside_k)
        else:
            rate_bias = tl.load(dt_bias + decay_head).to(tl.float32)
    if RANK > 0:
        decay_rows, decay_bias = read_factor(factors, factors_bias, decay_at, inside_k, RANK)
        gate_row = (HV // DECAY_GROUP) * K + head * V
        gate_rows, gate_bias = read_factor(factors, factors_bias, gate_row + columns, inside, RANK)
    wait(OVERLAP)
    position = tl.load(positions + slot)
    if head == 0:
        tl.store(length + slot, (position + 1) * tl.load(live + row))
    z += row * z_stride
    v_at, write_at, gate_at = z + v + head * V, z + write + head * V, z + output_gate + head * V
    q_at, k_at = z + q + key_head * K, z + k + key_head * K
    q_row, k_row = read(q_at + dims, inside_k), read(k_at + dims, inside_k)
    if NUM_V == 1:
        value = read(v_at + columns, inside)
    decays, gate, step = 0.0, 0.0, 1.0
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        decays, gate = read(z + decay + ranks, ranks < RANK), read(z + output_gate + ranks, ranks < RANK)
    else:
        if DECAY > TABLE:
            if DECAY_CHANNELS:
                decays = read(z + decay + decay_at, inside_k)
            else:
                decays = tl.load(z + decay + decay_head).to(tl.float32)
        if OUTPUT_GATE != NO_OUTPUT_GATE:
            gate = read(gate_at + columns, inside)
    if GATES != NO_GATE and GATES < VECTORS:
        step = tl.load(z + erase + head).to(tl.float32)
    if GATES == VECTORS_ETA:
        # eta stands behind write
        step = tl.load(z + write + HV * V + head).to(tl.float32)
    if GATES >= VECTORS:
        erase_row = read(z + erase + key_head * K + dims, inside_k)
        if NUM_V == 1:
            write_row = read(write_at + columns, inside)
    if RANK > 0:
        decays = tl.sum(decay_rows.to(tl.float32) * decays[None, :], 1) + decay_bias
        gate = tl.sum(gate_rows.to(tl.float32) * gate[None, :], 1) + gate_bias

    q_row = scale * read_head(q_row, q_at, dims, K, position, log_theta, SILU, FEATURES, UNIT, D)
    k_row = read_head(k_row, k_at, dims, K, position, log_theta, SILU, FEATURES, UNIT, D)
    keep = tl.full([KP], 1.0, tl.float32)
    if DECAY == TABLE:
        keep *= 1 - tl.exp2(-5.0 - head)
    elif DECAY != NO_DECAY:
        keep *= tl.exp(log_decay(decays, rate, rate_bias, decay_constant, DECAY))

    if GATES == BETA:
        step = tl.sigmoid(step)
    if GATES == ETA:
        step = kaczmarz(step, k_row, kaczmarz_eps, EPS_MODE)
        if CLIP:
            step = tl.minimum(step, 1.0)
    if GATES == VECTORS_ETA:
        step = kaczmarz(step, k_row, kaczmarz_eps, EPS_MODE)
    if GATES < VECTORS and DOUBLED:
        step *= 2
    e_row = k_row
    if GATES >= VECTORS:
        erased = step * tl.sigmoid(erase_row)
        if CLIP:
            erased = tl.minimum(erased, 1.0)
        if DOUBLED:
            erased *= 2
        e_row *= erased
    else:
        e_row *= step

    total = 0.0
    squares = 0.0
    mean = 0.0
    factor = 1.0
    out += row * out_stride + head * V
    for block in tl.static_range(0, NUM_V):
        columns = block * BV + tl.arange(0, BV)
        inside = columns < V
        tile = state + dims[:, None] * V + columns[None, :]
        within = inside_k[:, None] & inside[None, :]
        S = first
        if block > 0:
            S = tl.load(tile, mask=within, other=0.0)
        if NUM_V > 1:
            value = read(v_at + columns, inside)
            if GATES >= VECTORS:
                write_row = read(write_at + columns, inside)
        S *= keep[:, None]
        value = featured(value, SILU, 0)
        if GATES < VECTORS:
            value *= step
        else:
            written = step * tl.sigmoid(write_row)
            if CLIP:
                written = tl.minimum(written, 1.0)
            value *= written
        if GATES != NO_GATE:
            value -= tl.sum(S * e_row[:, None], 0)
        S += k_row[:, None] * value[None, :]
        tl.store(tile, S, mask=within)
        o = tl.sum(S * q_row[:, None], 0)
        total += tl.sum(o, 0)
        squares += tl.sum(o * o, 0)
        if NUM_V == 1:
            mean, factor = norm_factors(total, squares, V, norm_eps, NORM)
            o = gated(o, gate, weight, bias, mean, factor, NORM, AFFINE, OUTPUT_GATE)
        tl.store(out + columns, o.to(out.dtype.element_ty), mask=inside)
    if NUM_V > 1 and (NORM != NO_NORM or OUTPUT_GATE != NO_OUTPUT_GATE):
        mean, factor = norm_factors(total, squares, V, norm_eps, NORM)
        for block in tl.static_range(0, NUM_V):
            # other threads wrote what these read
            tl.debug_barrier()
            columns = block * BV + tl.arange(0, BV)
            inside = columns < V
            o = read(out + columns, inside)
            if OUTPUT_GATE != NO_OUTPUT_GATE:
                gate = read(gate_at + columns, inside)
            weight, bias = read_norm(norm_weight, norm_bias, columns, inside, NORM, AFFINE)
            o = gated(o, gate, weight, bias, mean, factor, NORM, AFFINE, OUTPUT_GATE)
            tl.store(out + columns, o.to(out.dtype.element_ty), mask=inside)
