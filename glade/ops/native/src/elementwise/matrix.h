/* Rows of channels as vectors: fp32 or bf16 in memory, fp32 in registers, zeros beyond a row's end. */
#ifndef GLADE_ELEMENTWISE_MATRIX_H
#define GLADE_ELEMENTWISE_MATRIX_H

#include "call.h"
#include "simd.h"

INLINE char *row_at(const Matrix *x, long row) { return x->data + row * x->row * (x->dtype == FLOAT32 ? 4 : 2); }

/* Runs the statements for each vector of n channels: `at` is its first channel, `count` how many it has, a constant but
 * for a last vector that is not whole. */
#define EACH_VEC(at, count, n, ...)                          \
    do {                                                     \
        long at = 0;                                         \
        for (; at + LANES <= (n); at += LANES) {             \
            const long count = LANES;                        \
            __VA_ARGS__                                      \
        }                                                    \
        if (at < (n)) {                                      \
            const long count = (n) - at;                     \
            __VA_ARGS__                                      \
        }                                                    \
    } while (0)

/* the first `count` of LANES numbers, zeros after them */
INLINE vec get_floats(const float *x, long count) {
    if (count == LANES) return load(x);
    float part[LANES] = {0};
    for (long i = 0; i < count; i++) part[i] = x[i];
    return load(part);
}

INLINE void put_floats(float *x, long count, vec value) {
    if (count == LANES) {
        store(x, value);
        return;
    }
    float part[LANES];
    store(part, value);
    for (long i = 0; i < count; i++) x[i] = part[i];
}

/* `count` channels of a row from channel `at` on */
INLINE vec get(const char *row, int64_t dtype, long at, long count) {
    if (dtype == FLOAT32) return get_floats((const float *)row + at, count);
    const uint16_t *x = (const uint16_t *)row + at;
    if (count == LANES) return from_bfloat16(*(const hvec_at *)x);
    uint16_t part[LANES] = {0};
    for (long i = 0; i < count; i++) part[i] = x[i];
    return from_bfloat16(*(const hvec_at *)part);
}

INLINE void put(char *row, int64_t dtype, long at, long count, vec value) {
    if (dtype == FLOAT32) {
        put_floats((float *)row + at, count, value);
        return;
    }
    uint16_t *x = (uint16_t *)row + at;
    hvec halves = to_bfloat16(value);
    if (count == LANES) {
        *(hvec_at *)x = halves;
        return;
    }
    uint16_t part[LANES];
    *(hvec_at *)part = halves;
    for (long i = 0; i < count; i++) x[i] = part[i];
}

/* by halves: lane i takes lane i + LANES / 2, and so on, in registers */
INLINE float sum_lanes(vec x) {
#if LANES == 16
    x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    x += SHUFFLE(x, x, 2, 3, 0, 1);
#endif
    return x[0] + x[1];
}

INLINE float max_lanes(vec x) {
    float part[LANES];
    store(part, x);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* e^x within 2 ulp for x in [-87, 88], and the value at the nearer end beyond them; nan for nan */
INLINE vec exp_clamped(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = at_least_vec(at_most_vec(x, splat(88.0f)), splat(-87.0f));
    vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f; /* ln 2 in two parts, the first exact in a product with n */
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vec y = p * (r * r) + r + 1.0f;
    return (vec)((ivec)y + ((ivec)shifted << 23)); /* times 2^n: the low bits of `shifted` are n */
}

INLINE vec sigmoid_vec(vec x) { return 1.0f / (1.0f + exp_clamped(-x)); }

/* log(1 + u) for u in [0, 1], within some 1e-7 of itself: 2 atanh(s) with s = u / (2 + u) <= 1/3 */
INLINE vec log1p_vec(vec u) {
    vec s = u / (2.0f + u), x = s * s;
    vec p = splat(1.0f / 15);
    p = p * x + 1.0f / 13;
    p = p * x + 1.0f / 11;
    p = p * x + 1.0f / 9;
    p = p * x + 1.0f / 7;
    p = p * x + 1.0f / 5;
    p = p * x + 1.0f / 3;
    p = p * x + 1.0f;
    return 2.0f * s * p;
}

/* log(1 + e^x) */
INLINE vec softplus_vec(vec x) {
    vec positive = select_vec(x > 0.0f, x, splat(0.0f)), magnitude = select_vec(x > 0.0f, x, -x);
    return positive + log1p_vec(exp_clamped(-magnitude));
}

/* sums[0 .. count] += x */
INLINE void add_to(float *sums, long count, vec x) { put_floats(sums, count, get_floats(sums, count) + x); }

#endif
