/* Small dense products on register tiles. All operands are fp32 rows whose length is a multiple of LANES. */
#ifndef GLADE_PRODUCTS_H
#define GLADE_PRODUCTS_H

#include "simd.h"

/* accumulators of a tile: TILE_ROWS x TILE_VECS vectors, as many as the registers hold beside the operands */
#define TILE_ROWS 4
#if LANES == 16 || defined(__aarch64__)
#define TILE_VECS 4
#else
#define TILE_VECS 2
#endif

/* what is added of the old values (`old` has the rows of `out`, and may be it) */
typedef enum { REPLACE, ADD, SCALE_ROWS, SCALE_COLUMNS } Onto;

INLINE void finish_tile(vec (*acc)[TILE_VECS], float *out, const float *old, long out_row, int vecs, Onto onto,
                        const float *factor, long row, long column) {
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int c = 0; c < vecs; c++) {
            long at = r * out_row + c * LANES;
            if (onto == ADD) acc[r][c] += load(old + at);
            if (onto == SCALE_ROWS) acc[r][c] += factor[row + r] * load(old + at);
            if (onto == SCALE_COLUMNS) acc[r][c] += load(factor + column + c * LANES) * load(old + at);
            store(out + at, acc[r][c]);
        }
}

INLINE void product_tile(float *out, const float *old, long out_row, const float *a, long a_row, long a_inner, const float *b, long b_row,
                         long inner, int vecs, Onto onto, const float *factor, long row, long column) {
    vec acc[TILE_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int c = 0; c < vecs; c++) acc[r][c] = splat(0.0f);
    for (long i = 0; i < inner; i++) {
        vec y[TILE_VECS];
        UNROLL for (int c = 0; c < vecs; c++) y[c] = load(b + i * b_row + c * LANES);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            vec x = splat(a[r * a_row + i * a_inner]);
            UNROLL for (int c = 0; c < vecs; c++) acc[r][c] += x * y[c];
        }
    }
    finish_tile(acc, out, old, out_row, vecs, onto, factor, row, column);
}

/* out[rows, width] = (old, as `onto` says) + a[rows, inner] b[inner, width], where a[r, i] is a[r * a_row + i *
 * a_inner]; `rows` a multiple of TILE_ROWS, `width` of LANES. `factor` [rows] or [width] scales the old values. */
INLINE void product_inlined(float *out, const float *old, long out_row, const float *a, long a_row, long a_inner, const float *b, long b_row,
                            long rows, long width, long inner, Onto onto, const float *factor) {
    for (long column = 0; column < width; column += TILE_VECS * LANES) {
        long vecs = (width - column) / LANES;
        for (long row = 0; row < rows; row += TILE_ROWS) {
            long to = row * out_row + column;
            const float *x = a + row * a_row, *y = b + column;
#define TILE(n) product_tile(out + to, old + to, out_row, x, a_row, a_inner, y, b_row, inner, n, onto, factor, row, column)
            if (vecs >= TILE_VECS) TILE(TILE_VECS);
#if TILE_VECS > 2
            else if (vecs == 3) TILE(3);
            else if (vecs == 2) TILE(2);
#endif
            else TILE(1);
#undef TILE
        }
    }
}

/* one compiled copy for each kind of `onto` */
#define PRODUCT(name, onto)                                                                                          \
    static __attribute__((noinline, unused)) void name(float *out, const float *old, long out_row, const float *a,  \
                                                       long a_row, long a_inner, const float *b, long b_row,        \
                                                       long rows, long width, long inner, const float *factor) {    \
        product_inlined(out, old, out_row, a, a_row, a_inner, b, b_row, rows, width, inner, onto, factor);               \
    }
PRODUCT(product_replace, REPLACE)
PRODUCT(product_add, ADD)
PRODUCT(product_scale_rows, SCALE_ROWS)
PRODUCT(product_scale_columns, SCALE_COLUMNS)
#undef PRODUCT

INLINE void product_onto(float *out, const float *old, long out_row, const float *a, long a_row, long a_inner,
                         const float *b, long b_row, long rows, long width, long inner, Onto onto,
                         const float *factor) {
#define CALL(name) name(out, old, out_row, a, a_row, a_inner, b, b_row, rows, width, inner, factor)
    if (onto == REPLACE) CALL(product_replace);
    if (onto == ADD) CALL(product_add);
    if (onto == SCALE_ROWS) CALL(product_scale_rows);
    if (onto == SCALE_COLUMNS) CALL(product_scale_columns);
#undef CALL
}

INLINE void product(float *out, long out_row, const float *a, long a_row, long a_inner, const float *b, long b_row,
                    long rows, long width, long inner, Onto onto, const float *factor) {
    product_onto(out, out, out_row, a, a_row, a_inner, b, b_row, rows, width, inner, onto, factor);
}


/* out[4, 4] = x[4, width] y[4, width]^T: sums over lanes are batched, LANES at a time */
static __attribute__((noinline)) void dots_4x4(float *out, long out_row, const float *x, long x_row, const float *y, long y_row, long width) {
    enum { ROWS = LANES == 16 ? 4 : 2 };
    UNROLL for (int first = 0; first < 4; first += ROWS) {
        vec acc[ROWS * 4];
        UNROLL for (int i = 0; i < ROWS * 4; i++) acc[i] = splat(0.0f);
        for (long at = 0; at < width; at += LANES) {
            vec other[4];
            UNROLL for (int j = 0; j < 4; j++) other[j] = load(y + j * y_row + at);
            UNROLL for (int i = 0; i < ROWS; i++) {
                vec own = load(x + (first + i) * x_row + at);
                UNROLL for (int j = 0; j < 4; j++) acc[i * 4 + j] += own * other[j];
            }
        }
        float sums[ROWS * 4];
        UNROLL for (int i = 0; i < ROWS * 4; i += LANES) store(sums + i, sums_of(acc + i));
        UNROLL for (int i = 0; i < ROWS; i++) memcpy(out + (first + i) * out_row, sums + 4 * i, 4 * sizeof(float));
    }
}

/* Matrices that a product reads many times lie in panels of up to PANEL columns, each panel a block of its own: rows
 * of a power of two of bytes would share too few sets of the cache. Panel p of [rows, columns] starts at rows * PANEL * p. */
#define PANEL 64
INLINE long panel_width(long columns, long panel) {
    long left = columns - panel * PANEL;
    return left < PANEL ? left : PANEL;
}
INLINE long num_panels(long columns) { return (columns + PANEL - 1) / PANEL; }

/* in [rows, columns] and out [columns, rows], both in panels; rows and columns multiples of LANES */
static __attribute__((noinline, unused)) void transpose_panels(float *out, const float *in, long rows, long columns) {
    for (long p = 0; p < num_panels(columns); p++) {
        long width = panel_width(columns, p);
        for (long r = 0; r < rows; r += LANES) {
            long out_width = panel_width(rows, r / PANEL);
            float *to = out + r / PANEL * PANEL * columns + r % PANEL;
            for (long c = 0; c < width; c += LANES)
                transpose_block(to + (p * PANEL + c) * out_width, out_width, in + p * PANEL * rows + r * width + c,
                                width);
        }
    }
}

#endif
