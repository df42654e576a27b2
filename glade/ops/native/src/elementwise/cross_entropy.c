/* The loss of each row of logits, and its gradient.
 *
 *     loss = log sum exp l - l[target]        dl = (exp(l - logsumexp) - 1[target]) dloss
 *
 * Matrices: logits, bias [1, width] fp32 or absent, targets [1, rows] (int64, dtype unread), then fp32 [1, rows] each:
 * loss, logsumexp; or dloss, logsumexp and the matrix dlogits. Backward, the sum is the bias's gradient. */
#include "kernel.h"
#include "matrix.h"

enum { LOGITS, BIAS, TARGETS, LOSS, LOGSUMEXP, DLOGITS };

/* log x for x >= 1; inf and nan stay what they are */
static float log_of(float x) {
    if (!(x < __builtin_inff())) return x;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int power = (int)(bits >> 23) - 127;
    bits = (bits & 0x7fffff) | 0x3f800000;
    float mantissa; /* in [1, 2) */
    memcpy(&mantissa, &bits, sizeof mantissa);
    return power * 0.693147181f + log1p_vec(splat(mantissa - 1.0f))[0];
}

INLINE vec logits_at(const RowCall *c, const char *row, long at, long count) {
    vec l = get(row, c->m[LOGITS].dtype, at, count);
    const float *bias = (const float *)c->m[BIAS].data;
    return bias ? l + get_floats(bias + at, count) : l;
}

/* the lanes from `count` on become -inf */
INLINE vec only_real(vec x, long count) {
    if (count == LANES) return x;
    float part[LANES];
    store(part, x);
    for (long i = count; i < LANES; i++) part[i] = -__builtin_inff();
    return load(part);
}

void NAME(cross_entropy)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    const int64_t *targets = (const int64_t *)c->m[TARGETS].data;
    float *loss = (float *)c->m[LOSS].data, *logsumexp = (float *)c->m[LOGSUMEXP].data;
    for (long row = from; row < to; row++) {
        const char *in = row_at(&c->m[LOGITS], row);
        vec highest = splat(-__builtin_inff()), total = splat(0.0f);
        EACH_VEC(at, count, c->width, {
            vec l = only_real(logits_at(c, in, at, count), count);
            highest = select_vec(l > highest, l, highest);
        });
        float top = max_lanes(highest);
        EACH_VEC(at, count, c->width, total += exp_vec(only_real(logits_at(c, in, at, count), count) - top););
        logsumexp[row] = top + log_of(sum_lanes(total));
        loss[row] = logsumexp[row] - logits_at(c, in, targets[row], 1)[0];
    }
}

void NAME(cross_entropy_backward)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)memory;
    const int64_t *targets = (const int64_t *)c->m[TARGETS].data;
    const float *dloss = (const float *)c->m[LOSS].data, *logsumexp = (const float *)c->m[LOGSUMEXP].data;
    const Matrix *dlogits = &c->m[DLOGITS];
    for (long row = from; row < to; row++) {
        const char *in = row_at(&c->m[LOGITS], row);
        char *out = row_at(dlogits, row);
        EACH_VEC(at, count, c->width, {
            vec d = exp_vec(logits_at(c, in, at, count) - logsumexp[row]);
            long target = targets[row] - at;
            if (target >= 0 && target < LANES) d[target] -= 1.0f;
            d *= dloss[row];
            if (c->num_sums) add_to(sums + at, count, d);
            put(out, dlogits->dtype, at, count, d);
        });
    }
}
