/* Triangular products of a chunk's [CHUNK, CHUNK] matrices with its rows, exact to the triangle: no row is multiplied
 * with a zero that stands for a later token, whose value may be inf or nan. */
#ifndef GLADE_UPDATE_H
#define GLADE_UPDATE_H

#include "chunk.h"

/* out_i = factor_i * init_i + sum over j <= i of m[i, j] y_j. With `solve`, y is `out` itself and the sum over j < i is
 * subtracted: forward substitution. `vecs` vectors of each row. */
INLINE void lower_tile(float *out, long out_row, const float *init, const float *factor, const float *m, const float *y,
                       long row, long blocks, int vecs, int solve) {
    float sign = solve ? -1.0f : 1.0f;
    for (long block = 0; block < blocks; block++) {
        vec acc[BLOCK][TILE_VECS];
        const float *part = m + block * BLOCK * CHUNK;
        long base = block * BLOCK;
        UNROLL for (int r = 0; r < BLOCK; r++)
            UNROLL for (int c = 0; c < vecs; c++) {
                acc[r][c] = load(init + (base + r) * row + c * LANES);
                if (factor) acc[r][c] *= factor[base + r];
            }
        for (long j = 0; j < base; j++) {
            vec other[TILE_VECS];
            UNROLL for (int c = 0; c < vecs; c++) other[c] = load(y + j * row + c * LANES);
            UNROLL for (int r = 0; r < BLOCK; r++) {
                vec weight = splat(sign * part[r * CHUNK + j]);
                UNROLL for (int c = 0; c < vecs; c++) acc[r][c] += weight * other[c];
            }
        }
        part += base;
        UNROLL for (int s = 0; s < BLOCK; s++) {
            UNROLL for (int c = 0; c < vecs; c++) {
                vec other = solve ? acc[s][c] : load(y + (base + s) * row + c * LANES);
                UNROLL for (int r = solve ? s + 1 : s; r < BLOCK; r++) acc[r][c] += sign * part[r * CHUNK + s] * other;
            }
        }
        UNROLL for (int r = 0; r < BLOCK; r++)
            UNROLL for (int c = 0; c < vecs; c++) store(out + (base + r) * out_row + c * LANES, acc[r][c]);
    }
}

/* the same from the last row to the first with the transposed matrix: out_j = init_j + sum over i >= j of p[i, j] x_i,
 * and with `a` then minus the sum over i > j of a[i, j] out_i: back substitution */
INLINE void upper_tile(float *out, const float *p, const float *x, const float *a, long row, long blocks, int vecs) {
    for (long block = blocks - 1; block >= 0; block--) {
        vec acc[BLOCK][TILE_VECS];
        long base = block * BLOCK;
        UNROLL for (int r = 0; r < BLOCK; r++)
            UNROLL for (int c = 0; c < vecs; c++) acc[r][c] = load(out + (base + r) * row + c * LANES);
        for (long i = base; i < blocks * BLOCK; i++) {
            vec other[TILE_VECS];
            UNROLL for (int c = 0; c < vecs; c++) other[c] = load(x + i * row + c * LANES);
            UNROLL for (int r = 0; r < BLOCK; r++) {
                vec factor = splat(p[i * CHUNK + base + r]);
                UNROLL for (int c = 0; c < vecs; c++) acc[r][c] += factor * other[c];
            }
        }
        if (a) {
            for (long i = base + BLOCK; i < blocks * BLOCK; i++) {
                vec other[TILE_VECS];
                UNROLL for (int c = 0; c < vecs; c++) other[c] = load(out + i * row + c * LANES);
                UNROLL for (int r = 0; r < BLOCK; r++) {
                    vec factor = splat(a[i * CHUNK + base + r]);
                    UNROLL for (int c = 0; c < vecs; c++) acc[r][c] -= factor * other[c];
                }
            }
            UNROLL for (int s = BLOCK - 1; s > 0; s--)
                UNROLL for (int r = 0; r < s; r++) {
                    vec factor = splat(a[(base + s) * CHUNK + base + r]);
                    UNROLL for (int c = 0; c < vecs; c++) acc[r][c] -= factor * acc[s][c];
                }
        }
        UNROLL for (int r = 0; r < BLOCK; r++)
            UNROLL for (int c = 0; c < vecs; c++) store(out + (base + r) * row + c * LANES, acc[r][c]);
    }
}

/* runs `tile(column, vecs)` over columns 0 .. width in groups of TILE_VECS vectors; vecs is a constant in each */
#if TILE_VECS > 2
#define OVER_COLUMNS(width, tile)                                                     \
    for (long column = 0; column < (width); column += TILE_VECS * LANES) {            \
        long left = ((width) - column) / LANES;                                       \
        if (left >= TILE_VECS) { tile(column, TILE_VECS); }                           \
        else if (left == 3) { tile(column, 3); }                                      \
        else if (left == 2) { tile(column, 2); }                                      \
        else { tile(column, 1); }                                                     \
    }
#else
#define OVER_COLUMNS(width, tile)                                                     \
    for (long column = 0; column < (width); column += TILE_VECS * LANES) {            \
        if (((width) - column) / LANES >= TILE_VECS) { tile(column, TILE_VECS); }     \
        else { tile(column, 1); }                                                     \
    }
#endif

/* out_i = factor_i * x_i + (tril(p) y)_i; x and y have rows of `row` floats, out of `out_row` */
static __attribute__((noinline, unused)) void add_lower(float *out, long out_row, const float *x, const float *factor,
                                                        const float *p, const float *y, long row, long blocks,
                                                        long width) {
#define TILE(at, vecs) lower_tile(out + at, out_row, x + at, factor, p, y + at, row, blocks, vecs, 0)
    OVER_COLUMNS(width, TILE)
#undef TILE
}

/* x = (I + a)^-1 x */
static __attribute__((noinline, unused)) void solve_lower(float *x, const float *a, long row, long blocks,
                                                          long width) {
#define TILE(at, vecs) lower_tile(x + at, row, x + at, NULL, a, x + at, row, blocks, vecs, 1)
    OVER_COLUMNS(width, TILE)
#undef TILE
}

/* out = (I + a)^-T (out + p^T x), or without the solve if a is NULL */
static __attribute__((noinline, unused)) void solve_upper(float *out, const float *p, const float *x, const float *a,
                                                          long row, long blocks, long width) {
#define TILE(at, vecs) upper_tile(out + at, p, x + at, a, row, blocks, vecs)
    OVER_COLUMNS(width, TILE)
#undef TILE
}

#endif
