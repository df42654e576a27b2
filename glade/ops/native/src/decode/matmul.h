/* Products of a matrix with the rows of a batch, a tile of LANES sums at a time.
 *
 * A tile is `rows` rows of the matrix times `batch` rows of x with rows * batch == LANES: every weight is read and
 * widened once for the whole batch, and sums stay in registers. Each sum adds its products in one order whatever the
 * tile, so that a row's result does not depend on its neighbours in the batch. */
#ifndef GLADE_MATMUL_H
#define GLADE_MATMUL_H

#include "vectors.h"

/* how far ahead of its use a weight is asked for, in tiles */
#ifndef TILES_AHEAD
#define TILES_AHEAD 1
#endif

INLINE vec tile_sums(const char *weights, const float *const *x, const Matrix *m, long dtype, int rows, int batch) {
    const long size = size_of(dtype), line = 64 / size, columns = m->columns, pitch = columns * size;
    const char *ahead = weights + TILES_AHEAD * rows * pitch;
    vec sums[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = splat(0.0f);
    long at = 0;
    for (; at + line <= columns; at += line) {
        UNROLL for (int r = 0; r < rows; r++) __builtin_prefetch(ahead + r * pitch + at * size, 0, 2);
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
    if (at < columns) {
        vec inputs[LANES];
        UNROLL for (int b = 0; b < batch; b++) inputs[b] = row_at(x[b], at, columns);
        UNROLL for (int r = 0; r < rows; r++) {
            vec w = weights_upto(weights + r * pitch, at, columns, dtype);
            UNROLL for (int b = 0; b < batch; b++) sums[r * batch + b] += w * inputs[b];
        }
    }
    return sums_of(sums);
}

#endif
