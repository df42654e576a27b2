/* RMSNorm of each head of a row, its weight, and an optional gate; and that of a sum (add_rms_norm):
 *
 *     y = weight * x / sqrt(mean x^2 + eps) * act(gate)        act: silu or sigmoid
 *
 * Matrices: x, weight [1, head] fp32, gate or absent; y (forward); dy, dx, dgate (backward). The sum is the weight's
 * gradient: by channel of the row, the caller adds up its heads. A row is `heads` heads of width / heads channels. */
#include "kernel.h"
#include "matrix.h"

enum { X, WEIGHT, GATE, Y, DY, DX, DGATE };
enum { SILU = 1, SIGMOID = 2 };

INLINE float inverse_rms(const char *x, int64_t dtype, long n, float eps) {
    vec squares = splat(0.0f);
    EACH_VEC(at, count, n, {
        vec v = get(x, dtype, at, count);
        squares += v * v;
    });
    return 1.0f / __builtin_sqrtf(sum_lanes(squares) / n + eps);
}

INLINE char *head_of(const Matrix *x, long row, long channel) {
    return row_at(x, row) + channel * (x->dtype == FLOAT32 ? 4 : 2);
}

INLINE void forward(const RowCall *c, long from, long to, int kind) {
    const Matrix *x = &c->m[X], *gate = &c->m[GATE], *y = &c->m[Y];
    const float *weight = (const float *)c->m[WEIGHT].data;
    long n = c->width / c->heads;
    for (long row = from; row < to; row++)
        for (long first = 0; first < c->width; first += n) {
            const char *in = head_of(x, row, first), *g = kind ? head_of(gate, row, first) : NULL;
            char *out = head_of(y, row, first);
            float r = inverse_rms(in, x->dtype, n, c->eps);
            EACH_VEC(at, count, n, {
                vec value = get(in, x->dtype, at, count) * r * get_floats(weight + at, count);
                if (kind) {
                    vec z = get(g, gate->dtype, at, count), s = sigmoid_vec(z);
                    value *= kind == SILU ? z * s : s;
                }
                put(out, y->dtype, at, count, value);
            });
        }
}

void NAME(rms_norm)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    if (!c->m[GATE].data) forward(c, from, to, 0);
    else if (c->kind == SILU) forward(c, from, to, SILU);
    else forward(c, from, to, SIGMOID);
}

/* With u = x r and a = act(gate): dgate = dy weight u act', dweight = dy a u, and from du = dy a weight
 * dx = r (du - u mean(du u)). One loop over the heads for each of r, du and dx, since each of these ends a long chain:
 * so the processor works on several heads at a time. */
INLINE void backward(const RowCall *c, long from, long to, float *sums, float *memory, int kind) {
    const Matrix *x = &c->m[X], *gate = &c->m[GATE], *dy = &c->m[DY], *dx = &c->m[DX], *dgate = &c->m[DGATE];
    const float *weight = (const float *)c->m[WEIGHT].data;
    float *du = memory, *inverse = memory + whole(c->width), *mean = inverse + whole(c->width);
    long heads = c->heads, n = c->width / heads;
    for (long row = from; row < to; row++) {
        for (long h = 0; h < heads; h++) inverse[h] = inverse_rms(head_of(x, row, h * n), x->dtype, n, c->eps);
        for (long h = 0; h < heads; h++) {
            const char *in = head_of(x, row, h * n), *up = head_of(dy, row, h * n);
            const char *g = kind ? head_of(gate, row, h * n) : NULL;
            char *out_gate = kind ? head_of(dgate, row, h * n) : NULL;
            vec dot = splat(0.0f);
            EACH_VEC(at, count, n, {
                vec u = get(in, x->dtype, at, count) * inverse[h], w = get_floats(weight + at, count);
                vec d = get(up, dy->dtype, at, count);
                if (kind) {
                    vec z = get(g, gate->dtype, at, count), s = sigmoid_vec(z);
                    vec slope = kind == SILU ? s * (1.0f + z * (1.0f - s)) : s * (1.0f - s);
                    put(out_gate, dgate->dtype, at, count, d * w * u * slope);
                    d *= kind == SILU ? z * s : s;
                }
                add_to(sums + h * n + at, count, d * u);
                d *= w;
                dot += d * u;
                put_floats(du + h * n + at, count, d);
            });
            mean[h] = sum_lanes(dot) / n;
        }
        for (long h = 0; h < heads; h++) {
            const char *in = head_of(x, row, h * n);
            char *out = head_of(dx, row, h * n);
            EACH_VEC(at, count, n, {
                vec u = get(in, x->dtype, at, count) * inverse[h];
                vec d = get_floats(du + h * n + at, count) - u * mean[h];
                put(out, dx->dtype, at, count, inverse[h] * d);
            });
        }
    }
}

void NAME(rms_norm_backward)(const RowCall *c, long from, long to, float *sums, float *memory) {
    if (!c->m[GATE].data) backward(c, from, to, sums, memory, 0);
    else if (c->kind == SILU) backward(c, from, to, sums, memory, SILU);
    else backward(c, from, to, sums, memory, SIGMOID);
}

/* The residual stream: total = x + branch, y = weight * total / sqrt(mean total^2 + eps), a row one norm.
 * Matrices: x, weight, branch; y, total. */
void NAME(add_rms_norm)(const RowCall *c, long from, long to, float *sums, float *memory) {
    enum { X, WEIGHT, BRANCH, Y, TOTAL };
    (void)sums;
    const Matrix *x = &c->m[X], *branch = &c->m[BRANCH], *y = &c->m[Y], *total = &c->m[TOTAL];
    const float *weight = (const float *)c->m[WEIGHT].data;
    for (long row = from; row < to; row++) {
        const char *in = row_at(x, row), *more = row_at(branch, row);
        char *out = row_at(y, row), *sum = row_at(total, row);
        vec squares = splat(0.0f);
        EACH_VEC(at, count, c->width, {
            put(sum, total->dtype, at, count, get(in, x->dtype, at, count) + get(more, branch->dtype, at, count));
            vec t = get(sum, total->dtype, at, count);
            squares += t * t;
            put_floats(memory + at, count, t);
        });
        float r = 1.0f / __builtin_sqrtf(sum_lanes(squares) / c->width + c->eps);
        EACH_VEC(at, count, c->width, {
            vec t = get_floats(memory + at, count);
            put(out, y->dtype, at, count, t * r * get_floats(weight + at, count));
        });
    }
}

/* Matrices: total, weight, dtotal or absent, dy; dx, and dbranch or absent, which is dx in the branch's dtype. The sum
 * is the weight's gradient. */
void NAME(add_rms_norm_backward)(const RowCall *c, long from, long to, float *sums, float *du) {
    enum { TOTAL, WEIGHT, DTOTAL, DY, DX, DBRANCH };
    const Matrix *total = &c->m[TOTAL], *dtotal = &c->m[DTOTAL], *dy = &c->m[DY], *dx = &c->m[DX];
    const Matrix *dbranch = &c->m[DBRANCH];
    const float *weight = (const float *)c->m[WEIGHT].data;
    for (long row = from; row < to; row++) {
        const char *in = row_at(total, row), *up = row_at(dy, row);
        const char *more = dtotal->data ? row_at(dtotal, row) : NULL;
        char *out = row_at(dx, row), *out_branch = dbranch->data ? row_at(dbranch, row) : NULL;
        float r = inverse_rms(in, total->dtype, c->width, c->eps);
        vec dot = splat(0.0f);
        EACH_VEC(at, count, c->width, {
            vec u = get(in, total->dtype, at, count) * r, d = get(up, dy->dtype, at, count);
            add_to(sums + at, count, d * u);
            d *= get_floats(weight + at, count);
            dot += d * u;
            put_floats(du + at, count, d);
        });
        float mean = sum_lanes(dot) / c->width;
        EACH_VEC(at, count, c->width, {
            vec u = get(in, total->dtype, at, count) * r;
            vec d = r * (get_floats(du + at, count) - u * mean);
            if (more) d += get(more, dtotal->dtype, at, count);
            put(out, dx->dtype, at, count, d);
            if (out_branch) put(out_branch, dbranch->dtype, at, count, d);
        });
    }
}
