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
    at, dims, K, position, log_theta,
    SILU: tl.constexpr, FEATURES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q or k of one head as the recurrence takes it, fp32."""
    x = featured(tl.load(at + dims, mask=dims < K, other=0.0).to(tl.float32), SILU, FEATURES)
    x = tl.where(dims < K, x, 0.0)
    scale = 1.0
    if UNIT:
        scale = tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
    x *= scale
    if D > 0:
        x = turned(x, at, scale, dims, position, log_theta, D, SILU, FEATURES)
    return x


@triton.jit
def log_decay(z, a_log, dt_bias, head, at, inside, constant, DECAY: tl.constexpr):
    """g <= 0 of the channels `at` (of all heads' channels) from the numbers z."""
    if DECAY == LOGSIGMOID:
        g = -softplus(-z) / constant
    if DECAY == TEMPERED:
        g = -softplus(-z / constant)
    if DECAY == SOFTPLUS:
        bias = tl.load(dt_bias + at, mask=inside, other=0.0).to(tl.float32)
        g = -tl.exp(tl.load(a_log + head).to(tl.float32)) * softplus(z + bias)
    if DECAY == BOUNDED:
        bias = tl.load(dt_bias + at, mask=inside, other=0.0).to(tl.float32)
        g = constant * tl.sigmoid(tl.exp(tl.load(a_log + head).to(tl.float32)) * (z + bias))
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
def gated(o, z, weight, bias, columns, inside, mean, factor, NORM: tl.constexpr, AFFINE: tl.constexpr,
          OUTPUT_GATE: tl.constexpr):  # fmt: skip
    """norm(o) * act(z), z at the gate's numbers of this head."""
    if NORM != NO_NORM:
        o = (o - mean) * factor
        if AFFINE:
            o *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            if NORM == LAYER:
                o += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if OUTPUT_GATE != NO_OUTPUT_GATE:
        gate = tl.load(z + columns, mask=inside, other=0.0).to(tl.float32)
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
def heads_kernel(
    z, z_stride, q, k, v, decay, erase, write, output_gate, out, out_stride, slots, positions, live, length,
    state, a_log, dt_bias, norm_weight, norm_bias, norm_eps, scale, decay_constant, kaczmarz_eps, log_theta,
    HV, GROUP, DECAY_GROUP,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, NUM_V: tl.constexpr, SILU: tl.constexpr,
    FEATURES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DECAY: tl.constexpr, DECAY_CHANNELS: tl.constexpr,
    GATES: tl.constexpr, EPS_MODE: tl.constexpr, CLIP: tl.constexpr, DOUBLED: tl.constexpr,
    NORM: tl.constexpr, AFFINE: tl.constexpr, OUTPUT_GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """q, k, v, decay, erase, write, output_gate: where each begins in a row of z."""
    row, head = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    slot = tl.load(slots + row)
    dims = tl.arange(0, KP)
    inside_k = dims < K
    state += (slot * HV + head) * K * V
    columns = tl.arange(0, BV)
    first = tl.load(
        state + dims[:, None] * V + columns[None, :], mask=inside_k[:, None] & (columns < V)[None, :], other=0.0
    )
    wait(OVERLAP)
    position = tl.load(positions + slot)
    if head == 0:
        tl.store(length + slot, (position + 1) * tl.load(live + row))
    z += row * z_stride
    key_head = head // GROUP
    q_row = scale * read_head(z + q + key_head * K, dims, K, position, log_theta, SILU, FEATURES, UNIT, D)
    k_row = read_head(z + k + key_head * K, dims, K, position, log_theta, SILU, FEATURES, UNIT, D)

    keep = tl.full([KP], 1.0, tl.float32)
    if DECAY == TABLE:
        keep *= 1 - tl.exp2(-5.0 - head)
    elif DECAY != NO_DECAY:
        decay_head = head // DECAY_GROUP
        if DECAY_CHANNELS:
            at = decay_head * K + dims
            numbers = tl.load(z + decay + at, mask=inside_k, other=0.0).to(tl.float32)
            keep = tl.exp(log_decay(numbers, a_log, dt_bias, decay_head, at, inside_k, decay_constant, DECAY))
        else:
            number = tl.load(z + decay + decay_head).to(tl.float32)
            keep *= tl.exp(log_decay(number, a_log, dt_bias, decay_head, decay_head, True, decay_constant, DECAY))

    step = 1.0
    if GATES == BETA:
        step = tl.sigmoid(tl.load(z + erase + head).to(tl.float32))
    if GATES == ETA:
        step = kaczmarz(tl.load(z + erase + head).to(tl.float32), k_row, kaczmarz_eps, EPS_MODE)
        if CLIP:
            step = tl.minimum(step, 1.0)
    if GATES < VECTORS and DOUBLED:
        step *= 2
    e_row = k_row
    if GATES == VECTORS_ETA:
        # eta stands behind write
        step = kaczmarz(tl.load(z + write + HV * V + head).to(tl.float32), k_row, kaczmarz_eps, EPS_MODE)
    if GATES >= VECTORS:
        gate = step * tl.sigmoid(tl.load(z + erase + key_head * K + dims, mask=inside_k, other=0.0).to(tl.float32))
        if CLIP:
            gate = tl.minimum(gate, 1.0)
        if DOUBLED:
            gate *= 2
        e_row *= gate
    else:
        e_row *= step

    total = 0.0
    squares = 0.0
    mean = 0.0
    factor = 1.0
    out += row * out_stride + head * V
    gate_at = z + output_gate + head * V
    for block in tl.static_range(0, NUM_V):
        columns = block * BV + tl.arange(0, BV)
        inside = columns < V
        tile = state + dims[:, None] * V + columns[None, :]
        within = inside_k[:, None] & inside[None, :]
        S = first
        if block > 0:
            S = tl.load(tile, mask=within, other=0.0)
        S *= keep[:, None]
        value = tl.load(z + v + head * V + columns, mask=inside, other=0.0).to(tl.float32)
        value = featured(value, SILU, 0)
        if GATES < VECTORS:
            value *= step
        else:
            gate = step * tl.sigmoid(tl.load(z + write + head * V + columns, mask=inside, other=0.0).to(tl.float32))
            if CLIP:
                gate = tl.minimum(gate, 1.0)
            value *= gate
        if GATES != NO_GATE:
            value -= tl.sum(S * e_row[:, None], 0)
        S += k_row[:, None] * value[None, :]
        tl.store(tile, S, mask=within)
        o = tl.sum(S * q_row[:, None], 0)
        total += tl.sum(o, 0)
        squares += tl.sum(o * o, 0)
        if NUM_V == 1:
            mean, factor = norm_factors(total, squares, V, norm_eps, NORM)
            o = gated(o, gate_at, norm_weight, norm_bias, columns, inside, mean, factor, NORM, AFFINE, OUTPUT_GATE)
        tl.store(out + columns, o.to(out.dtype.element_ty), mask=inside)
    if NUM_V > 1 and (NORM != NO_NORM or OUTPUT_GATE != NO_OUTPUT_GATE):
        mean, factor = norm_factors(total, squares, V, norm_eps, NORM)
        for block in tl.static_range(0, NUM_V):
            # other threads wrote what these read
            tl.debug_barrier()
            columns = block * BV + tl.arange(0, BV)
            inside = columns < V
            o = tl.load(out + columns, mask=inside, other=0.0).to(tl.float32)
            o = gated(o, gate_at, norm_weight, norm_bias, columns, inside, mean, factor, NORM, AFFINE, OUTPUT_GATE)
            tl.store(out + columns, o.to(out.dtype.element_ty), mask=inside)
