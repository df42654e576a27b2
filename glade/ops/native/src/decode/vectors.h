/* What the instructions share: typed vectors, activations, norms, on rows of fp32 padded to whole vectors. */
#ifndef GLADE_VECTORS_H
#define GLADE_VECTORS_H

#include "program.h"
#include "simd.h"

#include <math.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef int8_t bvec_at __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE long size_of(long dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

/* the one place with instructions of a processor: GCC 12 widens bytes one by one */
INLINE vec widen_bytes(const char *data) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)data)));
#elif LANES == 8 && defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)data)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const bvec_at *)data, ivec), vec);
#endif
}

/* LANES weights from element `at` on */
INLINE vec weights_at(const char *data, long at, long dtype) {
    if (dtype == FLOAT32) return load((const float *)data + at);
    if (dtype == BFLOAT16) return from_bfloat16(*(const hvec_at *)((const uint16_t *)data + at));
    return widen_bytes(data + at);
}

INLINE float weight_at(const char *data, long at, long dtype) {
    if (dtype == FLOAT32) return ((const float *)data)[at];
    if (dtype == INT8) return ((const int8_t *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* to nearest, ties to even */
INLINE uint16_t bfloat16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* the same, zeros from `end` on */
INLINE vec weights_upto(const char *data, long at, long end, long dtype) {
    if (at + LANES <= end) return weights_at(data, at, dtype);
    float part[LANES] = {0};
    for (long i = 0; i < end - at; i++) part[i] = weight_at(data, at + i, dtype);
    return load(part);
}

INLINE vec vector_at(const Vector *x, long at, long end) { return weights_upto(x->data, at, end, x->dtype); }

/* the same of a row in the workspace, where what stands beyond its end has no meaning */
INLINE vec row_at(const float *x, long at, long end) {
    if (at + LANES <= end) return load(x + at);
    float part[LANES] = {0};
    for (long i = 0; i < end - at; i++) part[i] = x[at + i];
    return load(part);
}

INLINE void store_row(float *x, long at, long end, vec y) {
    if (at + LANES <= end) {
        store(x + at, y);
        return;
    }
    float part[LANES];
    store(part, y);
    for (long i = 0; i < end - at; i++) x[at + i] = part[i];
}

INLINE float sum_lanes(vec x) {
    float lanes[LANES], sum = 0.0f;
    store(lanes, x);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

INLINE vec sigmoid_vec(vec x) { return 1.0f / (1.0f + exp_vec(-x)); }
INLINE vec silu_vec(vec x) { return x / (1.0f + exp_vec(-x)); }
INLINE vec tanh_vec(vec x) { return 1.0f - 2.0f / (exp_vec(2.0f * x) + 1.0f); }
INLINE vec clamp_vec(vec x) { return select_vec(x < 0.0f, splat(0.0f), select_vec(x > 1.0f, splat(1.0f), x)); }
/* x (1 + tanh(u)) / 2 = x sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vec gelu_vec(vec x) { return x * sigmoid_vec(1.5957691216057308f * (x + 0.044715f * (x * x * x))); }

/* log(1 + e^x) = max(x, 0) + log1p(t),  t = e^-|x|,  log1p(t) = 2 artanh(t / (2 + t)) by its series, s <= 1/3 */
INLINE vec softplus_vec(vec x) {
    vec size = select_vec(x < 0.0f, -x, x), t = exp_vec(-size), s = t / (2.0f + t), s2 = s * s;
    vec p = splat(1.0f / 17);
    p = p * s2 + 1.0f / 15;
    p = p * s2 + 1.0f / 13;
    p = p * s2 + 1.0f / 11;
    p = p * s2 + 1.0f / 9;
    p = p * s2 + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    p = p * s2 + 1.0f;
    return select_vec(x > 0.0f, x, splat(0.0f)) + 2.0f * s * p;
}

/* y = norm(x) of n numbers; y may be x */
INLINE void norm_row(float *y, const float *x, long n, const Norm *norm) {
    float mean = 0.0f;
    if (norm->kind == LAYER) {
        vec sum = splat(0.0f);
        for (long at = 0; at < n; at += LANES) sum += row_at(x, at, n);
        mean = sum_lanes(sum) / (float)n;
    }
    vec squares = splat(0.0f);
    for (long at = 0; at < n; at += LANES) {
        vec d = row_at(x, at, n) - mean;
        if (at + LANES > n && norm->kind == LAYER)
            for (long i = n - at; i < LANES; i++) d[i] = 0.0f;
        squares += d * d;
    }
    float mean_square = sum_lanes(squares) / (float)n, eps = (float)norm->eps;
    float factor = norm->kind == RMS_EPS_OUTSIDE ? 1.0f / (sqrtf(mean_square) + eps) : 1.0f / sqrtf(mean_square + eps);
    for (long at = 0; at < n; at += LANES) {
        vec z = (row_at(x, at, n) - mean) * factor;
        if (norm->weight.data) z *= vector_at(&norm->weight, at, n);
        if (norm->bias.data) z += vector_at(&norm->bias, at, n);
        store_row(y, at, n, z);
    }
}

/* turns the first `turned` channels of a head, halves apart: (cos, sin) [turned / 2] each at `rotation` */
INLINE void rotate(float *x, const float *rotation, long turned) {
    long half = turned / 2;
    for (long i = 0; i < half; i++) {
        float low = x[i], high = x[i + half], c = rotation[i], s = rotation[i + half];
        x[i] = low * c - high * s;
        x[i + half] = high * c + low * s;
    }
}

/* memory of a task, cut in pieces of whole vectors */
INLINE float *cut(float **memory, long floats) {
    float *piece = *memory;
    *memory += padded(floats);
    return piece;
}

#endif
