/* Products with the state for bf16 inputs: operands rounded to bf16 and multiplied in pairs, sums in fp32. Only where the
 * processor does that (BFLOAT16_PAIRS); elsewhere, and for fp32 inputs, these are the products of products.h. */
#ifndef GLADE_PAIRS_H
#define GLADE_PAIRS_H

#include "products.h"

/* working memory of a product whose inner size or rows are `longest` (or it is a chunk's), in floats */
static inline size_t pairs_floats(long longest) { return (size_t)longest * (PANEL / 2 + 16) + 16 * PANEL; }

#ifdef BFLOAT16_PAIRS
/* rows i and i + 1 of in [inner, width] as one row of pairs; a last row without partner is paired with zeros */
INLINE void pack_pairs(uint32_t *out, const float *in, long in_row, long inner, long width) {
    for (long i = 0; i < inner; i += 2, out += width)
        for (long at = 0; at < width; at += LANES) {
            vec second = i + 1 < inner ? load(in + (i + 1) * in_row + at) : splat(0.0f);
            *(uvec_at *)(out + at) = zip_pairs(load(in + i * in_row + at), second);
        }
}

/* neighbours in a row as pairs; `inner` is padded with zeros to a multiple of LANES already */
INLINE void pack_rows(uint32_t *out, const float *in, long in_row, long rows, long inner) {
    for (long r = 0; r < rows; r++, out += padded(inner) / 2)
        for (long at = 0; at < inner; at += 2 * LANES) {
            const float *from = in + r * in_row + at;
            uvec both = round_pairs(load(from), at + LANES < inner ? load(from + LANES) : splat(0.0f));
            if (at + LANES < inner) *(uvec_at *)(out + at / 2) = both;
            else memcpy(out + at / 2, &both, 2 * LANES);
        }
}

INLINE void pairs_tile(float *out, const float *old, long out_row, const uint32_t *a, long a_row, long a_inner,
                       const uint32_t *b, long b_row, long inner, int vecs, Onto onto, const float *factor, long row,
                       long column) {
    vec acc[TILE_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int c = 0; c < vecs; c++) acc[r][c] = splat(0.0f);
    for (long i = 0; i < inner; i++) {
        uvec y[TILE_VECS];
        UNROLL for (int c = 0; c < vecs; c++) y[c] = *(const uvec_at *)(b + i * b_row + c * LANES);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            uvec x = (uvec){EACH_LANE(0)} + a[r * a_row + i * a_inner];
            UNROLL for (int c = 0; c < vecs; c++) acc[r][c] = add_pair_products(acc[r][c], x, y[c]);
        }
    }
    finish_tile(acc, out, old, out_row, vecs, onto, factor, row, column);
}

INLINE void pairs_inlined(float *out, const float *old, long out_row, const uint32_t *a, long a_row, long a_inner,
                          const uint32_t *b, long rows, long width, long inner, Onto onto, const float *factor) {
    for (long column = 0; column < width; column += TILE_VECS * LANES) {
        long vecs = (width - column) / LANES;
        for (long row = 0; row < rows; row += TILE_ROWS) {
            long to = row * out_row + column;
            const uint32_t *x = a + row * a_row, *y = b + column;
#define TILE(n) \
    pairs_tile(out + to, old + to, out_row, x, a_row, a_inner, y, width, inner, n, onto, factor, row, column)
            if (vecs >= TILE_VECS) TILE(TILE_VECS);
            else if (vecs == 3) TILE(3);
            else if (vecs == 2) TILE(2);
            else TILE(1);
#undef TILE
        }
    }
}

/* `product_onto` in pairs; either a_inner or a_row is 1, and `room` has pairs_floats */
static __attribute__((noinline, unused)) void pairs_product(float *room, float *out, const float *old, long out_row,
                                                            const float *a, long a_row, long a_inner, const float *b,
                                                            long b_row, long rows, long width, long inner, Onto onto,
                                                            const float *factor) {
    uint32_t *b_pairs = (uint32_t *)room, *a_pairs = b_pairs + (inner + 1) / 2 * width;
    pack_pairs(b_pairs, b, b_row, inner, width);
    long pair_row = 1, pair_inner = rows;
    if (a_inner == 1) {
        pack_rows(a_pairs, a, a_row, rows, padded(inner));
        pair_row = padded(inner) / 2, pair_inner = 1;
    } else {
        pack_pairs(a_pairs, a, a_inner, inner, rows);
    }
#define CALL(kind) \
    pairs_inlined(out, old, out_row, a_pairs, pair_row, pair_inner, b_pairs, rows, width, (inner + 1) / 2, kind, factor)
    if (onto == REPLACE) CALL(REPLACE);
    if (onto == ADD) CALL(ADD);
    if (onto == SCALE_ROWS) CALL(SCALE_ROWS);
    if (onto == SCALE_COLUMNS) CALL(SCALE_COLUMNS);
#undef CALL
}
#endif

/* `room`: working memory if the product is to be in pairs, or NULL */
INLINE void multiply(float *room, float *out, const float *old, long out_row, const float *a, long a_row, long a_inner,
                     const float *b, long b_row, long rows, long width, long inner, Onto onto, const float *factor) {
#ifdef BFLOAT16_PAIRS
    if (room) {
        pairs_product(room, out, old, out_row, a, a_row, a_inner, b, b_row, rows, width, inner, onto, factor);
        return;
    }
#endif
    (void)room;
    product_onto(out, old, out_row, a, a_row, a_inner, b, b_row, rows, width, inner, onto, factor);
}

#endif
