/* Reading and writing the rows of a call's tensors: any batch, token and head strides, fp32 or bf16, to fp32 rows
 * padded with zeros to whole vectors. */
#ifndef GLADE_ROWS_H
#define GLADE_ROWS_H

#include "call.h"
#include "simd.h"

INLINE char *row_of(const Array *x, long batch, long token, long head) {
    long size = x->dtype == FLOAT32 ? 4 : 2;
    return x->data + (batch * x->batch + token * x->token + head * x->head) * size;
}

/* the one element of a row, or of a broadcast one */
INLINE float element(const char *row, long dtype) {
    if (dtype == FLOAT32) {
        float x;
        memcpy(&x, row, sizeof x);
        return x;
    }
    uint16_t half;
    memcpy(&half, row, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* vector number `at / LANES` of a row of n channels, zeros beyond its end */
INLINE vec row_vec(const Array *x, const char *row, long at, long n) {
    if (x->channel == 0) {
        float part[LANES] = {0};
        for (long i = 0; i < n - at && i < LANES; i++) part[i] = element(row, x->dtype);
        return load(part);
    }
    if (x->dtype == FLOAT32) {
        if (at + LANES <= n) return load((const float *)row + at);
        float part[LANES] = {0};
        memcpy(part, (const float *)row + at, (n - at) * sizeof(float));
        return load(part);
    }
    if (at + LANES <= n) return from_bfloat16(*(const hvec_at *)((const uint16_t *)row + at));
    uint16_t part[LANES] = {0};
    memcpy(part, (const uint16_t *)row + at, (n - at) * sizeof(uint16_t));
    return from_bfloat16(*(const hvec_at *)part);
}

/* the channels first .. first + n of a row as fp32, readable to the end of the last vector: the row itself where it is
 * that already, else a copy in `room`, which has place for them */
INLINE const float *row_floats(float *room, const Array *x, const char *row, long first, long n) {
    if (x->dtype == FLOAT32 && x->channel && n % LANES == 0) return (const float *)row + first;
    for (long at = 0; at < n; at += LANES) store(room + at, row_vec(x, row, first + at, first + n));
    return room;
}

/* out = factor * rows token .. token + num of one head, [num, n], each padded to a multiple of LANES */
static inline void read_rows(float *out, long out_row, const Array *x, long batch, long token, long head, long num,
                             long n, float factor) {
    for (long i = 0; i < num; i++, out += out_row) {
        const float *row = row_floats(out, x, row_of(x, batch, token + i, head), 0, n);
        for (long at = 0; at < n; at += LANES) store(out + at, factor * load(row + at));
    }
}

/* asks for rows that are wanted soon: a head's rows lie apart, which no processor foresees. Inlined, since GCC takes a
 * function that only prefetches for one without effect. */
INLINE void prefetch_rows(const Array *x, long batch, long token, long head, long num, int to_write) {
    long bytes = (x->channel ? x->width : 1) * (x->dtype == FLOAT32 ? 4 : 2);
    if (!x->data) return;
    for (long i = 0; i < num; i++) {
        const char *row = row_of(x, batch, token + i, head);
        for (long at = 0; at < bytes; at += 64) {
            if (to_write) __builtin_prefetch(row + at, 1, 2);
            else __builtin_prefetch(row + at, 0, 2);
        }
    }
}

static inline void zero_rows(float *out, long out_row, long num, long n) {
    for (long i = 0; i < num; i++)
        for (long at = 0; at < n; at += LANES) store(out + i * out_row + at, splat(0.0f));
}

/* where a row of n channels may be written as whole vectors of fp32, or NULL */
INLINE float *direct_row(const Array *x, long batch, long token, long head, long n) {
    return x->dtype == FLOAT32 && n % LANES == 0 ? (float *)row_of(x, batch, token, head) : NULL;
}

/* channels first .. first + n of row (batch, token, head), which has unit channel stride */
static inline void write_row(const Array *x, long batch, long token, long head, long first, const float *in, long n) {
    char *row = row_of(x, batch, token, head);
    long at = 0;
    if (x->dtype == FLOAT32) {
        float *out = (float *)row + first;
        for (; at + LANES <= n; at += LANES) store(out + at, load(in + at));
        if (at < n) memcpy(out + at, in + at, (n - at) * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)row + first;
    for (; at + LANES <= n; at += LANES) *(hvec_at *)(out + at) = to_bfloat16(load(in + at));
    if (at < n) {
        uint16_t part[LANES];
        *(hvec_at *)part = to_bfloat16(load(in + at));
        memcpy(out + at, part, (n - at) * sizeof(uint16_t));
    }
}

#endif
