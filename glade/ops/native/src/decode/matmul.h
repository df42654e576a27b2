/* Products of a matrix with the rows of a batch, a tile of LANES sums at a time.
 *
 * A tile is `rows` rows of the matrix times `batch` rows of x with rows * batch == LANES: every weight is read and
 * widened once for the whole batch, and sums stay in registers. Each sum adds its products in one order whatever the
 * tile, so that a row's result does not depend on its neighbours in the batch. */
#ifndef GLADE_MATMUL_H
#define GLADE_MATMUL_H

#include "vectors.h"

/* rows of the matrix between the weights in use and those asked for */
#ifndef ROWS_AHEAD
#define ROWS_AHEAD 16
#endif
#if defined(__FMA__) || defined(__aarch64__)
#define FUSED(x, y, z) __builtin_fmaf(x, y, z)
#else
#define FUSED(x, y, z) ((x) * (y) + (z))
#endif

/* Rows read abreast. With one row of x few: memory is quickest where it is read in one go, and rows of a pitch that is a
 * power of two push each other out of the nearest cache. With several more: what is loaded of x serves as many. */
INLINE int rows_abreast(long dtype, int rows, int batch) {
    const int most = batch > 1 ? 8 : dtype == INT8 ? 2 : 1;
    return rows < most ? rows : most;
}

/* asks for some lines of 64 bytes; what is behind them */
INLINE const char *ask_for(const char *ahead, int lines) {
    UNROLL for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + i * 64, 0, 2);
    return ahead + lines * 64;
}

/* sums [rows, batch] += W x, of `rows` rows from `weights` on; as much memory from `ahead` on is asked for */
INLINE void add_products(vec *sums, const char *weights, const char *ahead, const float *const *x, long columns,
                         long dtype, int rows, int batch) {
    const long size = size_of(dtype), line = 64 / size, pitch = columns * size;
    /* one stream of fp32, with nothing to widen: the processor's own guesses are quicker (a fifth on a Zen 4) */
    const int guessed = dtype == FLOAT32 && batch == 1;
    long at = 0;
    for (; at + line <= columns; at += line) {
        if (!guessed) ahead = ask_for(ahead, rows);
        UNROLL for (int part = 0; part < line / LANES; part++) {
            long here = at + part * LANES;
            UNROLL for (int r = 0; r < rows; r++) {
                vec w = weights_at(weights + r * pitch, here, dtype);
                UNROLL for (int b = 0; b < batch; b++) sums[r * batch + b] += w * load(x[b] + here);
            }
        }
    }
    for (; at + LANES <= columns; at += LANES)
        UNROLL for (int r = 0; r < rows; r++) {
            vec w = weights_at(weights + r * pitch, at, dtype);
            UNROLL for (int b = 0; b < batch; b++) sums[r * batch + b] += w * load(x[b] + at);
        }
}

/* The products of the last columns where their number is no multiple of LANES, one by one: a compiler is free to round a
 * product before it is added, or not, and must take the same choice in every tile. */
INLINE vec last_products(const char *weights, const float *const *x, long columns, long dtype, int rows, int batch) {
    float sums[LANES] = {0};
    for (long at = columns / LANES * LANES; at < columns; at++)
        for (int i = 0; i < rows * batch; i++) {
            float w = weight_at(weights, i / batch * columns + at, dtype);
            sums[i] = FUSED(w, x[i % batch][at], sums[i]);
        }
    return load(sums);
}

/* dtype PAIRS: BFLOAT16 times rows of x in bfloat16, padded with zeros to whole lines. Where the processor multiplies
 * pairs, one instruction does what widening takes six for. */
enum { PAIRS = 3, PAIRED = 32 };

#ifdef BFLOAT16_PAIRS
enum { HAS_PAIRS = 1 };
/* one line of weights, `at` to `at` + PAIRED, at `line` + r * pitch */
INLINE void add_line(vec *sums, const char *line, long pitch, const float *const *x, long at, int rows, int batch) {
    UNROLL for (int r = 0; r < rows; r++) {
        uvec w = *(const uvec_at *)(line + r * pitch);
        UNROLL for (int b = 0; b < batch; b++)
            sums[r * batch + b] = add_pair_products(sums[r * batch + b], w, *(const uvec_at *)(x[b] + at / 2));
    }
}

INLINE void add_pairs(vec *sums, const char *weights, const char *ahead, const float *const *x, long columns, int rows,
                      int batch) {
    const long pitch = columns * 2;
    long at = 0;
    for (; at + PAIRED <= columns; at += PAIRED) {
        ahead = ask_for(ahead, rows);
        add_line(sums, weights + at * 2, pitch, x, at, rows, batch);
    }
    if (at == columns) return;
    uint16_t rest[LANES][PAIRED];
    memset(rest, 0, rows * sizeof *rest);
    for (int r = 0; r < rows; r++) memcpy(rest[r], weights + r * pitch + at * 2, (columns - at) * 2);
    add_line(sums, (const char *)rest, sizeof *rest, x, at, rows, batch);
}
#else
enum { HAS_PAIRS = 0 };
INLINE void add_pairs(vec *sums, const char *weights, const char *ahead, const float *const *x, long columns, int rows,
                      int batch) {
    (void)sums, (void)weights, (void)ahead, (void)x, (void)columns, (void)rows, (void)batch;
}
#endif

/* The shapes of a tile; one row where fewer than a tile's are left. With more rows of x than these it is read again, from
 * the nearest cache. */
enum { MOST_BATCH = LANES / 2 < 4 ? LANES / 2 : 4 };

/* lane r * batch + b: row r of W times row b of x. `ahead`: what will be read soon */
INLINE vec tile_sums(const char *weights, const char *ahead, const float *const *x, long columns, long dtype, int rows,
                     int batch) {
    vec sums[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = splat(0.0f);
    const int abreast = rows_abreast(dtype, rows, batch);
    UNROLL for (int r = 0; r < rows; r += abreast) {
        const long skipped = r * columns * size_of(dtype);
        const char *first = weights + skipped, *soon = ahead + skipped;
        if (dtype == PAIRS) add_pairs(sums + r * batch, first, soon, x, columns, abreast, batch);
        else add_products(sums + r * batch, first, soon, x, columns, dtype, abreast, batch);
    }
    vec total = sums_of(sums);
    if (dtype != PAIRS && columns % LANES) total += last_products(weights, x, columns, dtype, rows, batch);
    return total;
}

#endif
